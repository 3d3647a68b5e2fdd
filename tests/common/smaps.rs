//! What `/proc/self/smaps` says about an address.

use std::collections::HashMap;

/// One mapping of this process, as the kernel sees it.
#[derive(Debug)]
pub struct Region {
    pub start: usize,
    pub end: usize,
    /// `r--p`, `rw-p`, `rw-s`, …
    pub perms: String,
    /// In the file, of the first byte.
    pub offset: u64,
    pub path: String,
    /// Sizes in bytes.
    pub sizes: HashMap<String, usize>,
    /// Two letters each: `lo` is locked, `nr` not reserved, `ac` reserved, `hg` and `nh` huge pages or none.
    pub flags: Vec<String>,
}

impl Region {
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|found| found == flag)
    }

    pub fn size(&self, name: &str) -> usize {
        self.sizes[name]
    }
}

pub fn regions() -> Vec<Region> {
    let mut found: Vec<Region> = Vec::new();
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap();
        if let Some((start, end)) = first.split_once('-') {
            let address = |text| usize::from_str_radix(text, 16).unwrap();
            let perms = words.next().unwrap().to_owned();
            let offset = u64::from_str_radix(words.next().unwrap(), 16).unwrap();
            let path = words.skip(2).collect::<Vec<_>>().join(" ");
            let (start, end) = (address(start), address(end));
            let (sizes, flags) = (HashMap::new(), Vec::new());
            found.push(Region { start, end, perms, offset, path, sizes, flags });
        } else if first == "VmFlags:" {
            found.last_mut().unwrap().flags = words.map(str::to_owned).collect();
        } else if let Some(Ok(kib)) = words.next().map(str::parse::<usize>) {
            found.last_mut().unwrap().sizes.insert(first.trim_end_matches(':').to_owned(), kib << 10);
        }
    }
    found
}

/// The mapping that an address lies in.
pub fn at(address: usize) -> Region {
    regions().into_iter().find(|region| (region.start..region.end).contains(&address)).unwrap()
}
