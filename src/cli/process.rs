//! A process, and what it maps of some files: what /proc/PID says.

use super::smaps::{Id, Usage, each_mapping, each_usage};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};

#[derive(Serialize)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) user: String,
    pub(super) uid: u32,
    pub(super) command: String,
    #[serde(flatten)]
    pub(super) usage: Usage,
    /// The same for each file that it maps.
    pub(super) files: Vec<FileUsage>,
}

#[derive(Serialize)]
pub(super) struct FileUsage {
    /// Its place in the list of files.
    pub(super) file: usize,
    #[serde(flatten)]
    pub(super) usage: Usage,
}

impl Process {
    /// `None` where it maps none of the files.
    pub(super) fn look(
        pid: u32,
        places: &HashMap<Id, usize>,
        users: &HashMap<u32, String>,
    ) -> io::Result<Option<Self>> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        // Cheap for the process and for us; smaps walks its page tables, and makes it wait meanwhile.
        let mut maps = BufReader::new(File::open(proc.join("maps"))?);
        let mut mapped = false;
        each_mapping(&mut maps, |header| mapped |= places.contains_key(&header.id))?;
        if !mapped {
            return Ok(None);
        }
        let mut by_file: BTreeMap<usize, Usage> = BTreeMap::new();
        let mut smaps = BufReader::new(File::open(proc.join("smaps"))?);
        each_usage(
            &mut smaps,
            |id| places.contains_key(&id),
            |id, usage| {
                if let Some(&file) = places.get(&id) {
                    *by_file.entry(file).or_default() += usage;
                }
            },
        )?;
        if by_file.is_empty() {
            return Ok(None);
        }
        let mut usage = Usage::default();
        for part in by_file.values() {
            usage += *part;
        }
        let files = by_file.into_iter().map(|(file, usage)| FileUsage { file, usage }).collect();
        let text = beginning(&proc.join("status"))?;
        let (uid, name) = status(&text);
        let user = users.get(&uid).cloned().unwrap_or_else(|| uid.to_string());
        let command = beginning(&proc.join("cmdline"))?.replace('\0', " ").trim_end().to_owned();
        let command = if command.is_empty() { format!("[{name}]") } else { command };
        Ok(Some(Self { pid, user, uid, command, usage, files }))
    }
}

/// Enough of a file that a process may make long.
fn beginning(path: &Path) -> io::Result<String> {
    const ENOUGH: u64 = 4096;
    let mut bytes = Vec::new();
    File::open(path)?.take(ENOUGH).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into())
}

/// Effective user and name of a process, of its status.
fn status(status: &str) -> (u32, &str) {
    let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    let uid = field("Uid:").split_whitespace().nth(1).and_then(|uid| uid.parse().ok());
    (uid.unwrap_or(u32::MAX), field("Name:").trim())
}

/// Names by number. Whoever is known only to another directory has the number for a name.
pub(super) fn users() -> HashMap<u32, String> {
    let text = fs::read("/etc/passwd").unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            Some((fields.nth(1)?.parse().ok()?, name.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_who_and_what() {
        let text = "Name:\ta b\nUmask:\t0022\nUid:\t1000\t1001\t1002\t1003\nGid:\t5\t5\t5\t5\n";
        assert_eq!(status(text), (1001, "a b"));
        assert_eq!(status(""), (u32::MAX, ""));
    }
}
