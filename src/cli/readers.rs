//! How many processes map some files.

use super::smaps::{Id, each_mapping};
use super::top::id_of;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::BufReader;
use std::path::PathBuf;

/// For each of several groups of files, the processes that map one of them at least. Those that this one may not look
/// at are left out. `None` where there is no table of processes.
pub(super) fn readers(groups: &[&[PathBuf]]) -> Option<Vec<usize>> {
    let mut places: HashMap<Id, Vec<usize>> = HashMap::new();
    for (place, files) in groups.iter().enumerate() {
        // The same ones may be asked for twice.
        files.iter().filter_map(|file| id_of(file)).for_each(|id| places.entry(id).or_default().push(place));
    }
    let mut found = vec![0; groups.len()];
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let is_process = entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
        let Ok(maps) = File::open(entry.path().join("maps")) else { continue };
        let mut mapped = BTreeSet::new();
        if is_process && !places.is_empty() {
            // It may end meanwhile.
            each_mapping(&mut BufReader::new(maps), |header| {
                mapped.extend(places.get(&header.id).into_iter().flatten());
            })
            .ok();
        }
        for &place in mapped {
            found[place] += 1;
        }
    }
    Some(found)
}
