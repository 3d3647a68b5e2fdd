//! What can be written over what: everything that writes, with each of its inputs, links to them, other spellings and
//! files of other kinds for its output. It is refused, and nothing has happened; or done, and right.

use crate::common::{self, bytes_tensor};
use maptensors::{
    Content, DType, Draft, HeaderEdit, Layout, Model, ModelMut, SaveOptions, apply_delta, materialize,
    save_delta, save_diff,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Tensors by name.
type Tensors = BTreeMap<String, Vec<u8>>;

/// Of 3,000 bytes and of 50, so that a limit makes two shards of them.
fn tensors(value: u8) -> Tensors {
    [("a", 3000), ("b", 50)].map(|(name, len)| (name.to_owned(), vec![value; len])).into()
}

fn put(tensors: &Tensors, path: &Path, options: &SaveOptions) -> maptensors::Result<()> {
    options.save(tensors.iter().map(|(name, bytes)| (name.clone(), bytes_tensor(bytes))), path)
}

fn quick() -> SaveOptions {
    SaveOptions::new().durable(false)
}

fn found(path: &Path) -> Result<Tensors, String> {
    let model = Model::read(path).map_err(|error| error.to_string())?;
    Ok(model.tensors().map(|t| (t.name().to_owned(), t.as_bytes().to_vec())).collect())
}

#[track_caller]
fn is_found(path: &Path, value: u8) {
    let found = found(path).unwrap_or_else(|error| panic!("{error}"));
    assert!(found == tensors(value), "{}: other values than {value}", path.display());
}

#[allow(unsafe_code)]
fn open(path: &Path) -> ModelMut {
    // SAFETY: files of a test, which writes into none.
    unsafe { ModelMut::open(path) }.unwrap()
}

/// What stands in the directory that everything is tried in.
const FILES: [&str; 19] = [
    "base.safetensors",
    "new.safetensors",
    "other.safetensors",
    "one.delta.safetensors",
    "other.delta.safetensors",
    "picture.svg",
    "notes.txt",
    "config.json",
    "fifo",
    "fifo.safetensors",
    "dir",
    "dir.safetensors",
    "set/model.safetensors.index.json",
    "set/model-00001-of-00002.safetensors",
    "set/model-00002-of-00002.safetensors",
    "more/model.safetensors.index.json",
    "more/model-00001-of-00002.safetensors",
    "more/model-00002-of-00002.safetensors",
    "empty",
];

fn make(root: &Path) {
    put(&tensors(1), &root.join("base.safetensors"), &quick()).unwrap();
    put(&tensors(2), &root.join("new.safetensors"), &quick()).unwrap();
    put(&tensors(3), &root.join("other.safetensors"), &quick()).unwrap();
    for (new, delta) in
        [("new.safetensors", "one.delta.safetensors"), ("other.safetensors", "other.delta.safetensors")]
    {
        let (base, new) = (root.join("base.safetensors"), root.join(new));
        quick().save_diff(&Model::read(base).unwrap(), &Model::read(new).unwrap(), root.join(delta)).unwrap();
    }
    for (name, text) in
        [("picture.svg", "<svg/>"), ("notes.txt", "mine"), ("config.json", "{}"), ("empty", "")]
    {
        fs::write(root.join(name), text).unwrap();
    }
    common::fifo(&root.join("fifo"));
    common::fifo(&root.join("fifo.safetensors"));
    for name in ["dir", "dir.safetensors", "set", "more", "links", "new"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    for (name, value) in [("set", 4), ("more", 5)] {
        put(&tensors(value), &root.join(name).join("model.safetensors"), &quick().max_shard_size(3000))
            .unwrap();
    }
    assert!(FILES.iter().all(|name| root.join(name).exists()));
}

/// Everything below a directory: bytes, or what a link says, or what it is.
fn snapshot(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let content = if kind.is_dir() {
                left.push(path.clone());
                b"a directory".to_vec()
            } else if kind.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if kind.is_fifo() {
                b"a FIFO".to_vec()
            } else {
                fs::read(&path).unwrap()
            };
            all.insert(path.strip_prefix(root).unwrap().to_owned(), content);
        }
    }
    all
}

/// How something is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    Save,
    SaveShards,
    Draft,
    ModelSave,
    SetSave,
    Edited,
    EditedClone,
    Delta,
    Diff,
    SetDiff,
    Apply,
    SetApply,
    Header,
    CommandDelta,
    CommandApply,
    CommandEdit,
    CommandPicture,
}

const WRITERS: [Writer; 17] = [
    Writer::Save,
    Writer::SaveShards,
    Writer::Draft,
    Writer::ModelSave,
    Writer::SetSave,
    Writer::Edited,
    Writer::EditedClone,
    Writer::Delta,
    Writer::Diff,
    Writer::SetDiff,
    Writer::Apply,
    Writer::SetApply,
    Writer::Header,
    Writer::CommandDelta,
    Writer::CommandApply,
    Writer::CommandEdit,
    Writer::CommandPicture,
];

const SET: [&str; 3] = [
    "set/model.safetensors.index.json",
    "set/model-00001-of-00002.safetensors",
    "set/model-00002-of-00002.safetensors",
];

impl Writer {
    /// The files that it reads.
    fn inputs(self) -> Vec<&'static str> {
        match self {
            Self::Save | Self::SaveShards | Self::Draft | Self::Header | Self::CommandEdit => vec![],
            Self::ModelSave | Self::Edited | Self::EditedClone | Self::Delta | Self::CommandPicture => {
                vec!["base.safetensors"]
            }
            Self::SetSave => SET.to_vec(),
            Self::Diff | Self::CommandDelta => vec!["base.safetensors", "new.safetensors"],
            Self::SetDiff => [&SET[..], &["new.safetensors"]].concat(),
            Self::Apply | Self::CommandApply => vec!["base.safetensors", "one.delta.safetensors"],
            Self::SetApply => [&SET[..], &["one.delta.safetensors"]].concat(),
        }
    }

    /// Whether writing over an input is what it is for.
    fn means(self, input: &str, out: &Path) -> bool {
        match self {
            Self::ModelSave | Self::Edited | Self::EditedClone => input == "base.safetensors",
            // Its own name, whose index and shards give way to the file.
            Self::SetSave => out.ends_with("set/model.safetensors"),
            _ => false,
        }
    }

    fn run(self, root: &Path, out: &Path) -> Result<(), String> {
        let at = |name: &str| root.join(name);
        let said = |done: maptensors::Result<()>| done.map_err(|error| error.to_string());
        let tuned = || {
            let mut model = open(&at("base.safetensors"));
            for mut tensor in model.tensors_mut().unwrap() {
                tensor.as_bytes_mut().fill(2);
            }
            model
        };
        match self {
            Self::Save => said(put(&tensors(9), out, &quick())),
            Self::SaveShards => said(put(&tensors(9), out, &quick().max_shard_size(3000))),
            Self::Draft => said((|| {
                let layout = Layout::builder().tensor("a", DType::U8, &[3000]).tensor("b", DType::U8, &[50]);
                let mut draft = Draft::create(out, &layout.build()?)?;
                draft.tensors_mut()?.for_each(|mut tensor| tensor.as_bytes_mut().fill(9));
                draft.commit()
            })()),
            Self::ModelSave => said(open(&at("base.safetensors")).save(out)),
            Self::SetSave => said(open(&at("set")).save(out)),
            Self::Edited => said(tuned().save(out)),
            Self::EditedClone => said(tuned().materialize(out).map(drop)),
            Self::Delta => said(save_delta(&tuned(), out)),
            Self::Diff => said(save_diff(&open(&at("base.safetensors")), &open(&at("new.safetensors")), out)),
            Self::SetDiff => said(save_diff(&open(&at("set")), &open(&at("new.safetensors")), out)),
            Self::Apply => {
                let delta = [Model::read(at("one.delta.safetensors")).unwrap()];
                said(materialize(open(&at("base.safetensors")), &delta, out))
            }
            // The delta is of another base, which is as good: nothing may come of it either.
            Self::SetApply => {
                let delta = [Model::read(at("one.delta.safetensors")).unwrap()];
                said(materialize(open(&at("set")), &delta, out))
            }
            Self::Header => said(HeaderEdit::new().metadata("k", "v").apply(out).map(drop)),
            Self::CommandDelta => command(root, &["delta", "base.safetensors", "./new.safetensors"], out),
            Self::CommandApply => {
                command(root, &["apply", "./base.safetensors", "one.delta.safetensors"], out)
            }
            Self::CommandEdit => command(root, &["edit", "--set", "k=v"], out),
            Self::CommandPicture => command(root, &["inspect", "--map", "base.safetensors", "--svg"], out),
        }
    }

    /// That what was written is what it should be.
    fn is_right(self, root: &Path, out: &Path, before: &[u8]) {
        let base = || open(&root.join("base.safetensors"));
        let applied = |base: ModelMut| -> Tensors {
            let model = apply_delta(base, &[Model::read(out).unwrap()]).unwrap();
            model.tensors().map(|t| (t.name().to_owned(), t.as_bytes().to_vec())).collect()
        };
        match self {
            Self::Save | Self::Draft => is_found(out, 9),
            Self::SaveShards => {
                let mut index = out.as_os_str().to_owned();
                index.push(".index.json");
                is_found(Path::new(&index), 9);
            }
            Self::ModelSave => is_found(out, 1),
            Self::SetSave => is_found(out, 4),
            Self::Edited | Self::EditedClone | Self::Apply | Self::CommandApply => {
                is_found(out, 2);
            }
            Self::SetApply => panic!("a delta of another base was applied"),
            Self::Delta | Self::Diff | Self::CommandDelta => assert!(applied(base()) == tensors(2)),
            Self::SetDiff => assert!(applied(open(&root.join("set"))) == tensors(2)),
            Self::Header | Self::CommandEdit => {
                let model = Model::read(out).unwrap();
                assert_eq!(model.metadata().text("k"), Some("v"));
                // The tensors are those that it had.
                let was = Model::read(Content::new(before)).unwrap();
                assert!(was.tensors().all(|t| model.tensor(t.name()).unwrap().as_bytes() == t.as_bytes()));
            }
            Self::CommandPicture => assert!(fs::read_to_string(out).unwrap().starts_with("<svg")),
        }
    }
}

fn command(root: &Path, args: &[&str], out: &Path) -> Result<(), String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_maptensors"));
    let done = command.args(args).arg(out).current_dir(root).output().unwrap();
    if done.status.success() {
        return Ok(());
    }
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    Err(String::from_utf8(done.stderr).unwrap())
}

/// How an output is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    Plain,
    Dot,
    Twice,
    ThroughDirectory,
    LinkedDirectory,
    HardLink,
    Link,
    LinkToLink,
    Trailing,
}

const SPELLINGS: [Spelling; 9] = [
    Spelling::Plain,
    Spelling::Dot,
    Spelling::Twice,
    Spelling::ThroughDirectory,
    Spelling::LinkedDirectory,
    Spelling::HardLink,
    Spelling::Link,
    Spelling::LinkToLink,
    Spelling::Trailing,
];

impl Spelling {
    /// The path that is written to, for a name below the directory; `None` where there is no such way.
    fn of(self, root: &Path, name: &str) -> Option<PathBuf> {
        let (path, link) = (root.join(name), root.join("links/link.safetensors"));
        Some(match self {
            Self::Plain => path,
            Self::Dot => root.join(".").join(name),
            Self::Twice => PathBuf::from(format!("{}//{name}", root.display())),
            Self::ThroughDirectory => root.join("dir/..").join(name),
            Self::LinkedDirectory => {
                symlink(".", root.join("links/here")).unwrap();
                root.join("links/here/..").join(name)
            }
            Self::HardLink => {
                fs::hard_link(&path, &link).ok()?;
                link
            }
            Self::Link => {
                symlink(Path::new("..").join(name), &link).unwrap();
                link
            }
            Self::LinkToLink => {
                symlink(Path::new("..").join(name), root.join("links/first")).unwrap();
                symlink("first", &link).unwrap();
                link
            }
            Self::Trailing => PathBuf::from(format!("{}/", path.display())),
        })
    }
}

/// Names that nothing has yet, of this kind and of others.
const NEW: [&str; 9] = [
    "new/model.safetensors",
    "new/model",
    "new/model.safetensors.index.json",
    "new/model.json",
    "new/model.gguf",
    "new/model.PT",
    "new/picture.svg",
    "set/model.safetensors",
    "more/model.safetensors",
];

fn check(writer: Writer, target: &str, spelling: Spelling) -> Result<(), String> {
    // Where nothing waits for a disk.
    let memory = Path::new("/dev/shm");
    let root = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let root = root.path();
    make(root);
    let Some(out) = spelling.of(root, target) else { return Ok(()) };
    let before = snapshot(root);
    let done = writer.run(root, &out);
    let after = snapshot(root);
    let changed: BTreeSet<&PathBuf> =
        before.keys().chain(after.keys()).filter(|path| before.get(*path) != after.get(*path)).collect();
    let Ok(()) = done else {
        assert!(changed.is_empty(), "{done:?}, and changed {changed:?}");
        return done;
    };
    writer.is_right(root, &out, before.get(Path::new(target)).map_or(&[], Vec::as_slice));
    for input in writer.inputs() {
        let meant = writer.means(input, &out) || !changed.contains(&PathBuf::from(input));
        assert!(meant, "done, and {input} is another");
    }
    // Nothing but the output is another, and what it takes the place of.
    let place = fs::canonicalize(out.parent().unwrap()).unwrap();
    let place = place.strip_prefix(fs::canonicalize(root).unwrap()).unwrap().to_owned();
    let file = out.file_name().unwrap().to_string_lossy().into_owned();
    let stem = file.strip_suffix(".safetensors").unwrap_or(&file);
    for path in changed {
        let name = path.file_name().unwrap().to_string_lossy();
        let of_set = name.strip_prefix(stem).is_some_and(|rest| {
            rest == ".safetensors.index.json" || rest.starts_with('-') && rest.contains("-of-")
        });
        // What edits a file in place shows by all its names.
        let edited = matches!(writer, Writer::Header | Writer::CommandEdit) && path == Path::new(target);
        let is_output = path.parent() == Some(&place) && (name == file || of_set);
        assert!(is_output || edited, "done, and changed {}", path.display());
    }
    // One directory, one truth.
    if ["set", "more"].iter().any(|dir| place == Path::new(dir)) && stem == "model" {
        assert_eq!(found(&root.join(&place)), found(&out).or_else(|_| found(&root.join(&place))));
        assert!(
            !(root.join(&place).join("model.safetensors").exists()
                && root.join(&place).join("model.safetensors.index.json").exists())
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_over_anything_is_refused_or_right(
        writer in prop::sample::select(&WRITERS[..]),
        name in prop::sample::select([&FILES[..], &NEW[..]].concat()),
        spelling in prop::sample::select(&SPELLINGS[..]),
    ) {
        check(writer, name, spelling).ok();
    }
}

#[test]
fn every_writer_writes_to_a_new_name_and_over_what_it_is_for() {
    for writer in WRITERS {
        let names: &[&str] = match writer {
            Writer::SetApply => &[],
            Writer::Header | Writer::CommandEdit => {
                &["base.safetensors", "set/model-00001-of-00002.safetensors", "one.delta.safetensors"]
            }
            Writer::Delta | Writer::Diff | Writer::SetDiff | Writer::CommandDelta => {
                &["new/model", "new/model.safetensors", "other.delta.safetensors", "empty", "notes.txt"]
            }
            Writer::CommandPicture => &["new/picture.svg", "new/model", "picture.svg", "empty"],
            Writer::SaveShards => &["new/model.safetensors", "other.safetensors", "more/model.safetensors"],
            _ => &[
                "new/model",
                "new/model.safetensors",
                "other.safetensors",
                "more/model.safetensors",
                "empty",
            ],
        };
        for name in names {
            for spelling in
                [Spelling::Plain, Spelling::Dot, Spelling::ThroughDirectory, Spelling::LinkedDirectory]
            {
                check(writer, name, spelling)
                    .unwrap_or_else(|error| panic!("{writer:?} {name} {spelling:?}: {error}"));
            }
        }
    }
}

#[test]
fn no_writer_writes_over_an_input_by_whatever_name() {
    for writer in WRITERS {
        for input in writer.inputs() {
            for spelling in SPELLINGS {
                let done = check(writer, input, spelling);
                let link = matches!(spelling, Spelling::HardLink | Spelling::Link | Spelling::LinkToLink);
                let meant = writer.means(input, Path::new(input)) && spelling != Spelling::Trailing;
                assert_eq!(done.is_ok(), meant, "{writer:?} {input} {spelling:?} {link}: {done:?}");
            }
        }
    }
}

#[test]
fn a_name_with_a_slash_behind_it_names_no_file_to_any_writer() {
    for writer in WRITERS {
        for name in ["base.safetensors", "new/model.safetensors", "dir"] {
            assert!(check(writer, name, Spelling::Trailing).is_err(), "{writer:?} {name}");
        }
    }
}

#[test]
fn what_replaces_another_kind_of_file_is_refused_with_what_to_do() {
    for (writer, name, says) in [
        (Writer::ModelSave, "set/model.safetensors.index.json", "save to "),
        (Writer::SetSave, "set/model.safetensors.index.json", "save to "),
        (
            Writer::SetSave,
            "set/model-00001-of-00002.safetensors",
            "one of the files that this model was opened from",
        ),
        (Writer::Save, "new/model.gguf", "GGUF"),
        (Writer::SaveShards, "new/model.PT", "a torch archive"),
        (Writer::CommandApply, "more/model.safetensors.index.json", "save to "),
        (Writer::CommandApply, "other.delta.safetensors", "name another file to write to"),
        (Writer::CommandDelta, "base.safetensors", "is an input"),
        (Writer::CommandDelta, "other.safetensors", "is a model"),
        (Writer::CommandPicture, "base.safetensors", "a picture would be written"),
        (Writer::CommandPicture, "notes.txt", "no SVG"),
        (Writer::CommandEdit, "set/model.safetensors.index.json", "edit the files that it names"),
    ] {
        let error = check(writer, name, Spelling::Plain).unwrap_err();
        assert!(error.contains(says) && error.contains(name), "{writer:?} {name}: {error}");
    }
}
