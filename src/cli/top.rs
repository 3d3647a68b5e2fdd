//! `maptensors top`: which processes map a model's files, and what that costs them.

use super::process::{Process, users};
use super::smaps::{Id, Usage, each_mapping};
use super::table::Table;
use super::{DONE, inspect, text};
use crate::error::printable;
use crate::map::cached::Album;
use crate::os::open_regular;
use crate::{Error, Model};
use memmap2::MmapOptions;
use serde::Serialize;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, IsTerminal as _, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Which files to look for, and how often.
pub(super) struct Top {
    pub(super) paths: Vec<PathBuf>,
    pub(super) json: bool,
    /// `None`: once.
    pub(super) interval: Option<Duration>,
    /// Columns to fit into, where there is a terminal.
    pub(super) width: Option<usize>,
}

impl Top {
    pub(super) fn run(&self, out: &mut impl Write) -> Result<u8, Box<dyn std::error::Error>> {
        // What scrolled away before stays as it is.
        let clear = self.interval.is_some() && !self.json && io::stdout().is_terminal();
        let users = users();
        let mut rounds = 0usize;
        loop {
            let found = Found::look(&self.paths, &users)?;
            if clear {
                write!(out, "\x1b[H\x1b[2J")?;
            } else if rounds > 0 && !self.json {
                writeln!(out)?;
            }
            if self.json {
                let json = serde_json::to_string(&found)?;
                writeln!(out, "{}", text::json_safe(&json))?;
            } else {
                found.show(out, self.width)?;
            }
            out.flush()?;
            let Some(interval) = self.interval else { return Ok(DONE) };
            rounds += 1;
            // Nothing of the terminal was changed, so Ctrl-C may end it as it ends any program.
            std::thread::sleep(interval);
        }
    }
}

/// What `--json` prints; the keys are an interface: add, but do not rename. All sizes are in bytes.
#[derive(Serialize)]
struct Found {
    files: Vec<Target>,
    /// The largest [`Usage::rss`] first.
    processes: Vec<Process>,
    /// Sums; what several processes share would count more than once in those of other fields.
    totals: Totals,
    /// Processes that this one may not look at.
    unreadable: usize,
}

/// A file to look for.
#[derive(Serialize)]
struct Target {
    path: String,
    #[serde(skip)]
    id: Id,
    inode: u64,
    nbytes: u64,
    /// Bytes in the page cache; `None`: the kernel does not tell.
    resident: Option<u64>,
}

#[derive(Serialize, Default)]
struct Totals {
    nbytes: u64,
    resident: Option<u64>,
    pss: u64,
    private_clean: u64,
    private_dirty: u64,
    swap: u64,
    locked: u64,
}

impl Found {
    fn look(paths: &[PathBuf], users: &HashMap<u32, String>) -> crate::Result<Self> {
        let mut files: Vec<Target> = Vec::new();
        let mut places = HashMap::new();
        for path in paths {
            for target in targets(path)? {
                // A file may be named twice.
                places.entry(target.id).or_insert_with(|| {
                    files.push(target);
                    files.len() - 1
                });
            }
        }
        let mut found = Self { files, processes: Vec::new(), totals: Totals::default(), unreadable: 0 };
        let proc = Path::new("/proc");
        for entry in fs::read_dir(proc).map_err(Error::io(proc, "listing the processes"))?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            match Process::look(pid, &places, users) {
                Ok(process) => found.processes.extend(process),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => found.unreadable += 1,
                // It ended meanwhile, or is one of the kernel's own.
                Err(_) => {}
            }
        }
        found.processes.sort_by_key(|process| (std::cmp::Reverse(process.usage.rss), process.pid));
        found.totals = Totals::of(&found.files, &found.processes);
        Ok(found)
    }

    fn show(&self, out: &mut impl Write, width: Option<usize>) -> io::Result<()> {
        if self.processes.is_empty() {
            let them = if self.files.len() == 1 { "it" } else { "any of them" };
            writeln!(out, "no process maps {them}")?;
        } else {
            let mut lines = Vec::new();
            self.table(width.is_some()).print(&mut lines, width)?;
            for line in String::from_utf8_lossy(&lines).lines() {
                // The command stands last, and gives way.
                match width {
                    Some(width) => {
                        writeln!(out, "{}", line.chars().take(width).collect::<String>().trim_end())?;
                    }
                    None => writeln!(out, "{line}")?,
                }
            }
        }
        let what = match self.files.as_slice() {
            [only] => printable(&only.path),
            files => text::plural(files.len(), "file"),
        };
        let cached = match self.totals.resident {
            Some(resident) => {
                let percent = text::percent(resident, self.totals.nbytes);
                format!("{} of it ({percent}) in the page cache", text::size(resident))
            }
            None => {
                "whether it is in memory is told only to its owner, and to those who may write to it".into()
            }
        };
        writeln!(out, "\n{what}: {}, {cached}", text::size(self.totals.nbytes))?;
        if self.unreadable > 0 {
            let processes = match self.unreadable {
                1 => "1 process".into(),
                n => format!("{} processes", text::count(n as u64)),
            };
            let hint = if rustix::process::geteuid().is_root() { "" } else { ": run as root" };
            writeln!(out, "{processes} could not be looked at{hint}")?;
        }
        Ok(())
    }

    /// On a terminal there is little room for a command.
    fn table(&self, terminal: bool) -> Table {
        let swap = self.totals.swap > 0;
        let locked = self.totals.locked > 0;
        let mut columns = vec![">PID", "<USER", ">SIZE", ">RSS", ">PSS", ">SHARED", ">PRIVATE"];
        columns.extend(locked.then_some(">LOCKED"));
        columns.extend(swap.then_some(">SWAP"));
        columns.push("<COMMAND");
        let mut table = Table::new(&columns);
        for Process { pid, user, usage, command, .. } in &self.processes {
            let private = usage.private_clean.saturating_add(usage.private_dirty);
            let mut row = vec![pid.to_string(), text::short_name(user)];
            row.extend([usage.size, usage.rss, usage.pss, usage.shared, private].map(text::size));
            row.extend(locked.then(|| text::size(usage.locked)));
            row.extend(swap.then(|| text::size(usage.swap)));
            row.push(printable(if terminal { without_directory(command) } else { command }));
            table.rows.push(row);
        }
        // What is shared would count once for each process, and is left out.
        let private = self.totals.private_clean.saturating_add(self.totals.private_dirty);
        let mut sums = vec!["total".into(), String::new(), String::new(), String::new()];
        sums.extend([text::size(self.totals.pss), String::new(), text::size(private)]);
        sums.extend(locked.then(|| text::size(self.totals.locked)));
        sums.extend(swap.then(|| text::size(self.totals.swap)));
        sums.push(match self.processes.len() {
            1 => "1 process".into(),
            n => format!("{} processes", text::count(n as u64)),
        });
        table.rows.push(sums);
        table
    }
}

impl Totals {
    fn of(files: &[Target], processes: &[Process]) -> Self {
        let mut all = Usage::default();
        for process in processes {
            all += process.usage;
        }
        Self {
            nbytes: files.iter().map(|file| file.nbytes).sum(),
            resident: files.iter().map(|file| file.resident).sum(),
            pss: all.pss,
            private_clean: all.private_clean,
            private_dirty: all.private_dirty,
            swap: all.swap,
            locked: all.locked,
        }
    }
}

/// The files that a path stands for.
fn targets(path: &Path) -> crate::Result<Vec<Target>> {
    let path = &*inspect::named(path).map_or(Cow::Borrowed(path), |found| Cow::Owned(found.path));
    // Before a model is opened: to read its header brings pages in.
    let mut album = Album::of(path);
    let files = if path.is_dir() {
        match inspect::open(path) {
            Ok(model) => files(&model),
            Err(_) => regular_files(path)?,
        }
    } else if path.as_os_str().as_encoded_bytes().ends_with(b".index.json") {
        files(&inspect::open(path)?)
    } else {
        return Ok(vec![Target::of(path, &mut album)?]);
    };
    files
        .iter()
        .filter_map(|path| match Target::of(path, &mut album) {
            // Listed, and gone since.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            target => Some(target),
        })
        .collect()
}

fn files(model: &Model) -> Vec<PathBuf> {
    (0..model.shards()).filter_map(|i| model.path(i)).map(Path::to_owned).collect()
}

/// Hidden files are left alone: an unfinished one is somebody's, and opening it would disturb.
fn regular_files(dir: &Path) -> crate::Result<Vec<PathBuf>> {
    let listing = "listing the directory";
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir, listing))? {
        let entry = entry.map_err(Error::io(dir, listing))?;
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        // Followed: a hub's cache has links.
        if !hidden && fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_file()) {
            files.push(entry.path());
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Error::NotRegular { path: dir.into(), found: "a directory without files" });
    }
    Ok(files)
}

impl Target {
    fn of(path: &Path, album: &mut Album) -> crate::Result<Self> {
        let metadata = fs::metadata(path).map_err(Error::io(path, "looking at the file"))?;
        let of_stat = id_of_stat(&metadata);
        let (id, resident) = match open_regular(path) {
            Ok((file, _)) => (mapped_id(&file).unwrap_or(of_stat), album.find(path)?.map(|c| c.total())),
            // Who may not read it may know who maps it all the same.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                (of_stat, None)
            }
            Err(error) => return Err(error),
        };
        Ok(Self {
            path: path.to_string_lossy().into(),
            id,
            inode: metadata.ino(),
            nbytes: metadata.len(),
            resident,
        })
    }
}

/// How the kernel's tables name the file at a path, as far as that can be known.
pub(super) fn id_of(path: &Path) -> Option<Id> {
    let (file, _) = open_regular(path).ok()?;
    mapped_id(&file).or_else(|| Some(id_of_stat(&file.metadata().ok()?)))
}

fn id_of_stat(metadata: &fs::Metadata) -> Id {
    let (major, minor) = device(metadata.dev());
    Id { major, minor, inode: metadata.ino() }
}

#[cfg(target_os = "linux")]
fn device(number: u64) -> (u64, u64) {
    (rustix::fs::major(number).into(), rustix::fs::minor(number).into())
}

#[cfg(not(target_os = "linux"))]
fn device(number: u64) -> (u64, u64) {
    (0, number)
}

/// How the kernel's tables name a file: it is mapped, and looked up. stat(2) may say another device, on
/// btrfs and overlays. `None` where that does not work, as with an empty file.
#[allow(unsafe_code)]
fn mapped_id(file: &File) -> Option<Id> {
    // SAFETY: what the stable-file contract protects is the bytes, and none is looked at.
    let map = unsafe { MmapOptions::new().len(1).map(file) }.ok()?;
    let at = map.as_ptr().addr() as u64;
    let mut id = None;
    let mut maps = BufReader::new(File::open("/proc/self/maps").ok()?);
    each_mapping(&mut maps, |header| {
        if (header.start..header.end).contains(&at) {
            id = Some(header.id);
        }
    })
    .ok()?;
    id
}

/// `python3 train.py` of `/usr/bin/python3 train.py`.
fn without_directory(command: &str) -> &str {
    let program = command.split(' ').next().unwrap_or_default();
    program.rfind('/').map_or(command, |slash| &command[slash + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_goes_without_its_directory_and_with_its_arguments() {
        for (whole, short) in [("/usr/bin/env a/b", "env a/b"), ("a /b", "a /b"), ("", ""), ("/", "")] {
            assert_eq!(without_directory(whole), short);
        }
    }
}
