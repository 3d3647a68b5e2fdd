//! What `--help` teaches, by example.

pub(super) const MAIN: &str = "\
Examples:
  maptensors inspect model.safetensors   what is in a file
  maptensors inspect checkpoint/         the same for shards, or a directory
  maptensors inspect --map checkpoint/   drawn, with what of it is in memory
  maptensors top checkpoint/             which processes map it
  maptensors publications                what is published in memory
  maptensors prefetch checkpoint/        read it into memory (and: evict)
  maptensors edit model.safetensors --set license=MIT
                                         change metadata, not the data
  maptensors diff a.safetensors b.safetensors
  maptensors verify checkpoint/          hold it against its own checksums
  maptensors demo                        open, use, edit and save a small model

Exit codes: 0 done, 1 failed, 2 the command line is not understood; diff,
changed and verify have their own.";

pub(super) const PREFETCH: &str = "\
Examples:
  maptensors prefetch checkpoint/
  maptensors prefetch model.safetensors --filter 'model.layers.[0-9].*'
  maptensors prefetch checkpoint/ --lock &

What is read stays in the page cache until other files need the room. With
--lock it stays until interrupted, within the limit that `ulimit -l` shows.
Nobody may write to the files meanwhile; renaming over them is fine.";

pub(super) const EVICT: &str = "\
Examples:
  maptensors evict checkpoint/
  maptensors evict model.safetensors --filter 'lm_head.*'

What a process has mapped and touched stays in memory, and what was edited.
Models in shared memory (/dev/shm) have nowhere else to be.";

pub(super) const CHECKSUM: &str = "\
Examples:
  maptensors checksum model.safetensors
  maptensors checksum checkpoint/ --budget 512MiB > sums

A line for each tensor, its checksum (XXH3, as saving with checksums puts it
into the file) and its name, behind that of the model where there are several.
What has been read is given back to the system, so that a model
larger than memory passes.";

pub(super) const DIFF: &str = "\
Examples:
  maptensors diff model.safetensors tuned.safetensors
  maptensors diff a/ b/ --json | jq '.changed[].name'
  maptensors diff a.safetensors b.safetensors > /dev/null && echo the same

Tensors are compared bit by bit, whatever their order and the files they are
in. Nobody may write to the files meanwhile; renaming over them is fine.

Exit codes: 0 the same, 1 different, 2 trouble.";

pub(super) const CHANGED: &str = "\
Examples:
  maptensors changed model.safetensors tuned.safetensors
  maptensors changed base/ tuned/ --filter '*.bias'
  maptensors changed base/ tuned/ --frozen 'embed.*' --frozen 'layers.0.*'

Only what changed is listed, the largest share first. A --frozen or --filter
that matches no tensor is trouble.

Exit codes: 0 done, 1 a frozen tensor changed, 2 trouble.";

pub(super) const VERIFY: &str = "\
Examples:
  maptensors verify model.safetensors
  maptensors verify --missing-ok *.safetensors

Files carry checksums when they were saved so: SaveOptions::checksums in Rust,
checksums=True in Python. They find damage, not deceit.

An index whose total_size is wrong is warned of. It loads all the same, so that
is no failure.

Exit codes: 0 as saved, 1 damaged (the tensors are named), 2 trouble, such as
a file without checksums.";

pub(super) const DELTA: &str = "\
Examples:
  maptensors delta model.safetensors tuned.safetensors tuned.delta.safetensors
  maptensors apply model.safetensors tuned.delta.safetensors again.safetensors

A delta holds the elements that differ, bit for bit, and knows which model it
is for. Where BASE carries checksums, applying it does not read all of BASE.
OUT is neither of both, nor another model: those are not written over.";

pub(super) const APPLY: &str = "\
Examples:
  maptensors apply model.safetensors one.delta.safetensors tuned.safetensors
  maptensors apply model.safetensors 1.delta 2.delta 3.delta tuned.safetensors

Each delta must have been made against what the ones before it make; another
model is refused. A base that carries checksums is known by them: verify it
where they may be stale. On xfs and btrfs the result shares unchanged blocks
with BASE. The last path is the file to write: not BASE, and no delta. If it
has the name of a sharded model, that goes.";

pub(super) const INSPECT: &str = "\
Examples:
  maptensors inspect model.safetensors
  maptensors inspect checkpoint/ --summary
  maptensors inspect model.safetensors --filter '*.bias' --filter 'layers.0.*'
  maptensors inspect *.safetensors --json | jq '.totals.nbytes'
  maptensors inspect model.safetensors --json \\
      | jq -r '.tensors[] | select(.aligned | not) | .name'

`align` is the largest power of two, at most 4096, that divides a tensor's
place in the file. A `!` behind it: too little for the dtype, so Python gets a
copy.

  maptensors inspect --map model.safetensors
  maptensors inspect --map --color always checkpoint/ | less -R
  maptensors inspect --map checkpoint/ --svg checkpoint.svg

Each row of a map starts with its offset in the file, and each cell is so many
bytes: colored by the dtype that most of them have, shaded by how much of them
is in memory, in the page cache (cachestat(2), or mincore(2)). Without color,
letters stand for the dtypes, to the left, and the shades to the right. On a
wide terminal a row ends with the first tensor that starts in it. Padding is
the spaces that a header ends with: nothing may lie between tensors.

  maptensors inspect policy              the current generation of what is
                                         published by that name

A file or directory of that name goes first. What lies in which segment is
shown as of shards.

Looking brings nothing into memory; what is shown is how it was before the
header was read. A map has no use for --json, --summary and --filter, and
refuses them.

Exit codes: 0 done, 1 a model could not be shown or no name of its tensors
matches --filter, 2 the command line is not understood.";

pub(super) const TOP: &str = "\
Examples:
  maptensors top model.safetensors
  maptensors top checkpoint/ --interval 2
  maptensors top model.safetensors --json | jq '.totals.pss'
  maptensors top policy                    what is published by that name
  sudo maptensors top /dev/shm/weights/    other users' processes too

RSS is what a process has of the files in its page tables; PSS divides each
page by the processes that have it, so that its total is what all of them take
together. PRIVATE is a process's alone: written copies, and what only it has
looked at so far. Files are known by device and inode: one that was renamed is
found under its new name, one that was replaced is another file.

Exit codes: 0 done, also where no process maps it; 1 failed; 2 the command
line is not understood. Ctrl-C ends --interval.";

pub(super) const PUBLICATIONS: &str = "\
Examples:
  maptensors publications
  maptensors publications policy ./weights --json | jq '.totals.allocated'
  maptensors publications policy --remove
  maptensors publications --json | jq -r '.publications[] |
      select(.publishing | not) | .name' | xargs -rd '\\n' \\
      maptensors publications --remove          all that nobody publishes

A publication stays in memory when its publisher ends or is killed: until the
next one goes on with it, the machine is restarted, or it is removed.

SIZE is what the tensors of the current generation have, TAKES all files
together: SPARE ones are used again, or were left behind; UNFINISHED ones are
being written, or were left so. PUBLISHER is the process that publishes now,
READERS how many processes map it, of those that may be looked at (more of
them: maptensors top). Without a PLACE, all are shown that have a name: of
this user, or in $MAPTENSORS_SHARE_DIR. Looking keeps nobody from publishing.

Who has a publication attached that is removed is told, and keeps what it
holds; the memory of that is free when it lets go.

Exit codes: 0 done, 1 there is none, or it could not be removed; 2 the
command line is not understood.";

pub(super) const EDIT: &str = "\
Examples:
  maptensors edit model.safetensors --set license=MIT --set step=1000
  maptensors edit model.safetensors --unset draft
  maptensors edit model.safetensors --rename transformer.wte.weight=wte.weight
  maptensors edit a.safetensors --rename w=v --rename v=w    two exchange names

Tensor data is neither read nor changed. A small change is made in place, by
one write that a power loss cannot tear, if nobody else has the file open;
otherwise a new file takes its place, whole or not at all. It shares the old
one's blocks where the file system can do that, and leaves room for later
edits in place. What stands before the first `=` is the key, or the tensor's
old name. What contradicts itself is refused, whatever the order.";

pub(super) const DEMO: &str = "\
Examples:
  maptensors demo
  maptensors demo --dir out/ && maptensors inspect out/digits-tuned.safetensors

It fails, with exit code 1, if what it shows turns out not to be so.";
