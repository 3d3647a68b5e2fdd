//! Mapping options, each by its effect on the kernel's own account of the mapping.
#![allow(unsafe_code)]

use crate::common::{self, child, disk_dir, noise, pass, role, smaps, unprivileged_child};
use maptensors::{
    Advice, DType, Draft, Error, Layout, MapOptions, Mapping, Memfd, Model, ModelMut, OpenOptions,
    SealedMemfd, apply_delta, save_delta,
};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const MIB: usize = 1 << 20;

/// A file of noise, written as saves write: at 2 MiB.
fn file_of(dir: &Path, len: usize) -> (PathBuf, File, Vec<u8>) {
    let path = dir.join("noise");
    let bytes = noise(5, len);
    let file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
    for (i, chunk) in bytes.chunks(2 * MIB).enumerate() {
        file.write_all_at(chunk, (i * 2 * MIB) as u64).unwrap();
    }
    file.sync_all().unwrap();
    (path, file, bytes)
}

fn map(options: &MapOptions, file: &File) -> Mapping {
    // SAFETY: a file of the test's own, which nobody writes meanwhile.
    unsafe { options.map(file) }.unwrap()
}

fn map_cow(options: &MapOptions, file: &File) -> Mapping {
    // SAFETY: as above.
    unsafe { options.map_copy_on_write(file) }.unwrap()
}

fn region(mapping: &Mapping) -> smaps::Region {
    smaps::at(mapping.as_bytes().as_ptr().addr())
}

fn page_faults() -> i64 {
    let usage = std::fs::read_to_string("/proc/self/stat").unwrap();
    // minflt is the tenth field; the second, in parentheses, may hold spaces.
    usage.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(7).unwrap().parse().unwrap()
}

#[test]
fn each_kind_of_mapping_has_the_protection_and_sharing_that_it_says() {
    let dir = disk_dir();
    let (path, file, _) = file_of(dir.path(), 3 * MIB);
    let options = MapOptions::new();
    let read_only = map(&options, &file);
    let found = region(&read_only);
    assert_eq!((&*found.perms, &*found.path), ("r--p", path.to_str().unwrap()));
    let mut copy = map_cow(&options, &file);
    assert_eq!(region(&copy).perms, "r--p");
    copy.try_as_bytes_mut().unwrap();
    assert_eq!(region(&copy).perms, "rw-p");
    let promised = map_cow(&options.clone().reserve_swap(true), &file);
    assert_eq!(region(&promised).perms, "rw-p");
    drop(promised);
    // SAFETY: nobody truncates the file.
    let shared = unsafe { options.map_shared(&file) }.unwrap();
    let regions = smaps::regions();
    let shared_region = regions.iter().find(|region| region.perms == "rw-s" && region.path == found.path);
    assert_eq!(shared_region.map(|region| region.end - region.start), Some(3 * MIB));
    let anonymous = options.anonymous(MIB).unwrap();
    let found = region(&anonymous);
    assert_eq!((&*found.perms, found.path.starts_with('/')), ("rw-p", false));
    drop(shared);
    drop(copy);
    drop(read_only);
    // The mapping under the copy-on-write one went with it.
    assert!(smaps::regions().iter().all(|region| Path::new(&region.path) != path));
}

#[test]
fn populating_reads_every_page_and_copies_none() {
    let dir = disk_dir();
    let (_, file, _) = file_of(dir.path(), 9 * MIB + 5000);
    for window in [0..9 * MIB as u64 + 5000, 4097..9 * MIB as u64, 5..6] {
        let options = MapOptions::new().window(window);
        for kind in [map, map_cow] {
            let lazy = kind(&options, &file);
            assert_eq!(lazy.residency(0..lazy.len()).unwrap().touched, 0);
            let is_there = common::soon(|| {
                let eager = kind(&options.clone().populate(true), &file);
                assert_eq!(region(&eager).size("Anonymous"), 0);
                let pages = eager.residency(0..eager.len()).unwrap();
                (pages.touched, pages.private) == (pages.pages, 0)
            });
            assert!(is_there);
        }
    }
    let is_there = common::soon(|| {
        let memory = MapOptions::new().populate(true).anonymous(3 * MIB).unwrap();
        let pages = memory.residency(0..3 * MIB).unwrap();
        pages.touched == pages.pages
    });
    assert!(is_there);
}

#[test]
fn locking_keeps_every_page_and_copies_none_until_it_is_written_or_promoted() {
    let dir = disk_dir();
    let len = 6 * MIB;
    let (_, file, bytes) = file_of(dir.path(), len);
    let options = MapOptions::new().lock(true);
    // One after the other: smaps divides locked pages by those who map them.
    for kind in [map, map_cow] {
        let is_there = common::soon(|| {
            let found = region(&kind(&options, &file));
            assert!(found.has("lo"), "{found:?}");
            ["Locked", "Rss", "Anonymous"].map(|name| found.size(name)) == [len, len, 0]
        });
        assert!(is_there);
    }
    let mut mapping = map_cow(&options, &file);
    mapping.try_as_bytes_mut().unwrap()[5] ^= 1;
    assert_eq!(mapping.residency(0..len).unwrap().private, 1);
    // The write took a huge page apart; its other pages are held again once they are touched.
    let is_there = common::soon(|| {
        assert!(mapping.as_bytes()[6..] == bytes[6..]);
        region(&mapping).size("Locked") == len
    });
    assert!(is_there);
    mapping.promote(2 * MIB..4 * MIB).unwrap();
    let middle = smaps::at(mapping.as_bytes()[3 * MIB..].as_ptr().addr());
    assert!(middle.has("lo") && middle.size("Anonymous") >= 2 * MIB, "{middle:?}");
    assert!(mapping.as_bytes()[6..] == bytes[6..]);
    let memory = options.anonymous(MIB).unwrap();
    assert_eq!(region(&memory).size("Locked"), MIB);
    assert!(!region(&map(&MapOptions::new(), &file)).has("lo"));
}

#[test]
fn a_limit_of_locked_memory_is_an_error_that_names_it() {
    const TEST: &str = "a_limit_of_locked_memory_is_an_error_that_names_it";
    if let Some(dir) = role("limited") {
        let limit = rustix::process::Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
        rustix::process::setrlimit(rustix::process::Resource::Memlock, limit).unwrap();
        let file = File::open(dir.join("noise")).unwrap();
        let options = MapOptions::new().lock(true);
        // SAFETY: a file of the test's own, which nobody writes meanwhile.
        let error = unsafe { options.map(&file) }.unwrap_err();
        assert!(
            matches!(error, Error::Limit { found: 0x40_0000, limit: 0x10_0000, .. }),
            "{error:?} (as root there is no limit)"
        );
        let text = error.to_string();
        assert!(
            ["4194304", "1048576", "RLIMIT_MEMLOCK", "ulimit -l"].iter().all(|part| text.contains(part)),
            "{text}"
        );
        // What is locked already counts.
        let half = map(&options.clone().window(..700 << 10), &file);
        // SAFETY: as above.
        let error = unsafe { options.window(..700 << 10).map(&file) }.unwrap_err();
        assert!(matches!(error, Error::Limit { found: 0x15_e000, .. }), "{error:?}");
        drop(half);
        // And nothing is locked by what was refused.
        let error = OpenOptions::new().lock(true).read(dir.join("model")).unwrap_err();
        assert!(matches!(&error, Error::Limit { path, .. } if path.ends_with("model")), "{error:?}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    file_of(dir.path(), 4 * MIB);
    model(&dir.path().join("model"), 2 * MIB);
    let (command, _home) = unprivileged_child(TEST, "limited", dir.path());
    pass(command);
}

#[test]
fn swap_is_reserved_where_asked_for_and_by_default_not_for_copy_on_write() {
    let overcommit = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap();
    if overcommit.trim() == "2" {
        return common::skip(
            "swap_is_reserved_where_asked_for_and_by_default_not_for_copy_on_write",
            "vm.overcommit_memory is 2: the kernel always reserves",
        );
    }
    let dir = disk_dir();
    let (_, file, _) = file_of(dir.path(), MIB);
    let options = MapOptions::new();
    let (yes, no) = (options.clone().reserve_swap(true), options.clone().reserve_swap(false));
    for (mapping, reserved) in [
        (map_cow(&options, &file), false),
        (map_cow(&yes, &file), true),
        (map_cow(&no, &file), false),
        (options.anonymous(MIB).unwrap(), true),
        (yes.anonymous(MIB).unwrap(), true),
        (no.anonymous(MIB).unwrap(), false),
    ] {
        let found = region(&mapping);
        assert_eq!((found.has("ac"), found.has("nr")), (reserved, !reserved), "{found:?}");
    }
}

#[test]
fn huge_pages_are_asked_for_unless_refused() {
    const TEST: &str = "huge_pages_are_asked_for_unless_refused";
    // Alone in a process: other tests fault too.
    let Some(dir) = role("alone") else {
        return pass(child(TEST, "alone", disk_dir().path()));
    };
    std::fs::create_dir_all(&dir).unwrap();
    let (_, file, bytes) = file_of(&dir, 32 * MIB);
    let faults = || {
        [(true, "hg"), (false, "nh")].map(|(huge, flag)| {
            let options = MapOptions::new().huge_pages(huge);
            let mapping = map(&options, &file);
            let copy = map_cow(&options, &file);
            assert!(region(&mapping).has(flag) && region(&copy).has(flag));
            assert!(region(&options.anonymous(MIB).unwrap()).has(flag));
            // From the disk: pages that are in memory stay as large as they came.
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            let before = page_faults();
            assert!(mapping.as_bytes() == bytes);
            page_faults() - before
        })
    };
    let first = faults();
    if common::on_tmpfs(&dir) {
        return common::skip(TEST, "on tmpfs: only the flags were tested, no faults counted");
    }
    // Where memory is in pieces there are few huge pages to be had.
    let few = |[with, without]: [i64; 2]| with * 4 <= without;
    let is_fewer = few(first) || common::soon(|| few(faults()));
    assert!(is_fewer, "page faults with huge pages and without: {first:?}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn promoted_pages_are_huge_unless_that_is_refused() {
    let dir = disk_dir();
    let path = dir.path().join("model.safetensors");
    model(&path, 8 * MIB);
    for (huge, flag, other) in [(true, "hg", "nh"), (false, "nh", "hg")] {
        let options = OpenOptions::new().dense_edits(true).huge_pages(huge);
        // SAFETY: a file of the test's own, which nobody writes meanwhile.
        let mut model = unsafe { options.open_mut(&path) }.unwrap();
        let name = model.names().next().unwrap().to_owned();
        let mut tensor = model.tensor_mut(&name).unwrap();
        let bytes = tensor.as_bytes_mut();
        bytes.fill(1);
        let middle = smaps::at(bytes[bytes.len() / 2..].as_ptr().addr());
        assert!(middle.path.is_empty() && middle.size("Anonymous") >= 4 * MIB, "{middle:?}");
        // Whether there were huge pages to be had is the machine's.
        assert!(middle.has(flag) && !middle.has(other), "{middle:?}");
        assert!(huge || middle.size("AnonHugePages") == 0);
    }
}

#[test]
fn a_window_at_any_byte_shows_those_bytes_and_works_like_a_whole_file() {
    let page = rustix::param::page_size();
    let dir = disk_dir();
    let (_, file, bytes) = file_of(dir.path(), 5 * MIB + 77);
    let all = bytes.len();
    for (start, end) in [
        (0, all),
        (1, all),
        (4095, 4097),
        (page, all),
        (page + 1, 3 * MIB),
        (2 * MIB + 3, all - 1),
        (all - 1, all),
        (all, all),
        (7, 7),
    ] {
        let options = MapOptions::new().window(start as u64..end as u64);
        let expected = &bytes[start..end];
        let mapping = map(&options, &file);
        assert_eq!((mapping.offset(), mapping.len()), (start as u64, end - start));
        assert!(mapping.as_bytes() == expected, "{start}..{end}");
        let mut copy = map_cow(&options, &file);
        if expected.is_empty() {
            continue;
        }
        // Advice takes the pages of a part, and those alone.
        let part = expected.len() / 2..expected.len() / 2 + 1;
        let is_there = common::soon(|| {
            copy.advise_range(Advice::PopulateRead, part.clone()).unwrap();
            copy.residency(part.clone()).unwrap().touched == 1
        });
        assert!(is_there);
        // Every page with a byte of the window counts.
        let pages = copy.residency(0..copy.len()).unwrap();
        assert_eq!(pages.pages, (end - 1) / page - start / page + 1);
        let mut edited = expected.to_vec();
        for at in [0, expected.len() / 2, expected.len() - 1] {
            edited[at] ^= 0xff;
            copy.try_as_bytes_mut().unwrap()[at] ^= 0xff;
        }
        copy.promote(part).unwrap();
        copy.promote(0..expected.len().min(page)).unwrap();
        assert!(copy.as_bytes() == edited);
        copy.promote(0..expected.len()).unwrap();
        let pages = copy.residency(0..copy.len()).unwrap();
        assert_eq!(pages.private, pages.pages);
        assert!(copy.as_bytes() == edited);
    }
    let mut on_disk = vec![0; all];
    file.read_exact_at(&mut on_disk, 0).unwrap();
    assert!(on_disk == bytes);
}

#[test]
fn a_window_outside_the_file_is_refused() {
    let dir = disk_dir();
    let (_, file, _) = file_of(dir.path(), 100);
    let refused = |options: MapOptions| {
        // SAFETY: as in `map`.
        unsafe { options.map(&file) }.unwrap_err()
    };
    for (error, end) in [
        (refused(MapOptions::new().window(..101)), 101),
        (refused(MapOptions::new().window(101..)), 101),
        (refused(MapOptions::new().window(..=100)), 101),
        (refused(MapOptions::new().window(50..u64::MAX)), u64::MAX),
        (refused(MapOptions::new().window(u64::MAX..)), u64::MAX),
    ] {
        assert!(
            matches!(error, Error::Truncated { found: 100, expected, .. } if expected == end),
            "{error:?} {end}"
        );
    }
    #[allow(clippy::reversed_empty_ranges)]
    let error = refused(MapOptions::new().window(60..50));
    assert!(matches!(error, Error::Argument(_)), "{error:?}");
}

/// A model of two tensors, the first of `len` bytes.
fn model(path: &Path, len: usize) -> Vec<u8> {
    let layout = Layout::builder()
        .tensor("big", DType::F32, &[len / 4])
        .tensor("small", DType::U8, &[3])
        .metadata("kind", "test")
        .build()
        .unwrap();
    let mut draft = Draft::create(path, &layout).unwrap();
    draft.tensor_mut("big").unwrap().as_bytes_mut().copy_from_slice(&noise(1, len));
    draft.tensor_mut("small").unwrap().as_bytes_mut().copy_from_slice(&[1, 2, 3]);
    draft.commit().unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn a_model_inside_a_larger_file_at_any_byte_is_a_model_like_any_other() {
    let dir = disk_dir();
    let plain = dir.path().join("plain.safetensors");
    let bytes = model(&plain, 3 * MIB);
    let whole = Model::read(&plain).unwrap();
    for before in [0, 1, 512, 4096, 5003, 2 * MIB + 4] {
        let path = dir.path().join("archive");
        std::fs::write(&path, [&noise(2, before), &bytes, &noise(3, 700)[..]].concat()).unwrap();
        let options = OpenOptions::new().window(before as u64..(before + bytes.len()) as u64);
        // SAFETY: a file of the test's own, which nobody writes meanwhile.
        let opened = unsafe { options.open(&path) }.unwrap();
        let read = options.read(&path).unwrap();
        let sealed = options.read_sealed(&path).unwrap();
        for (a, b) in
            [&opened, &read, &sealed].into_iter().flat_map(|model| model.tensors().zip(whole.tensors()))
        {
            assert_eq!((a.name(), a.dtype(), a.shape()), (b.name(), b.dtype(), b.shape()));
            assert!(a.as_bytes() == b.as_bytes(), "{before}");
        }
        assert_eq!(opened.mapping(0).unwrap().offset(), before as u64);
        assert_eq!(opened.metadata(), whole.metadata());
        for model in [&read, &sealed] {
            assert_eq!(model.tensor("big").unwrap().as_bytes().as_ptr().addr() % 64, 0);
        }
        // SAFETY: as above.
        let mut edited = unsafe { options.open_mut(&path) }.unwrap();
        let mut tensor = edited.tensor_mut("big").unwrap();
        tensor.as_bytes_mut()[MIB] ^= 1;
        tensor.as_bytes_mut()[MIB + 100] ^= 1;
        let changes = edited.changed().unwrap();
        let change = changes.get("big").unwrap();
        assert_eq!((changes.len(), change.elements, changes.private_pages()), (1, 2, change.pages));
        edited.promote().unwrap();
        assert_eq!(edited.changed().unwrap().elements(), 2);
        // A delta against it is one against the same model as a file of its own.
        let delta = dir.path().join("delta.safetensors");
        save_delta(&edited, &delta).unwrap();
        let again = apply_delta(ModelMut::read(&plain).unwrap(), &[Model::read(&delta).unwrap()]).unwrap();
        assert!(again.tensor("big").unwrap().as_bytes() == edited.tensor("big").unwrap().as_bytes());
        let out = dir.path().join("out.safetensors");
        edited.save(&out).unwrap();
        assert_eq!(std::fs::metadata(&out).unwrap().len(), bytes.len() as u64);
        // Materializing must not take the archive for the model's own file.
        maptensors::materialize(edited, &[], &out).unwrap();
        let made = Model::read(&out).unwrap();
        assert!(made.tensor("big").unwrap().as_bytes() == again.tensor("big").unwrap().as_bytes());
    }
}

#[test]
fn a_window_is_of_one_file() {
    let options = OpenOptions::new().window(8..);
    let refused = options.read("models/digits-sharded").unwrap_err();
    assert!(matches!(refused, Error::Argument(_)), "{refused:?}");
    let refused = options.read("models/digits.safetensors").unwrap_err();
    assert!(!matches!(refused, Error::Argument(_)), "{refused:?}"); // but not a model from there
}

#[test]
fn sealed_memory_cannot_be_written_shrunk_or_grown() {
    let mut memfd = Memfd::create("test", 10_000).unwrap();
    memfd.as_bytes_mut().copy_from_slice(&noise(4, 10_000));
    let sealed = memfd.seal().unwrap();
    assert_eq!((sealed.len().unwrap(), sealed.is_empty().unwrap()), (10_000, false));
    let mapping = MapOptions::new().map_sealed(&sealed).unwrap();
    let mut copy = MapOptions::new().window(77..).map_sealed_copy_on_write(&sealed).unwrap();
    copy.try_as_bytes_mut().unwrap().fill(0);
    let file = sealed.into_file();
    assert!(file.write_at(b"x", 0).is_err());
    assert!(file.set_len(0).is_err() && file.set_len(20_000).is_err());
    assert!(
        rustix::fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 4096)
            .is_err()
    );
    // SAFETY: what is refused cannot be used.
    assert!(unsafe { MapOptions::new().map_shared(&file) }.is_err());
    assert!(mapping.as_bytes() == noise(4, 10_000));
    let again = SealedMemfd::try_from(file).unwrap();
    assert!(MapOptions::new().map_sealed(&again).unwrap().as_bytes() == noise(4, 10_000));
    assert!(matches!(
        MapOptions::new().window(..10_001).map_sealed(&again),
        Err(Error::Truncated { found: 10_000, expected: 10_001, .. })
    ));
}

#[test]
fn a_descriptor_is_taken_for_sealed_memory_by_its_seals_alone() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let immutable = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    for missing in [SealFlags::WRITE, SealFlags::SHRINK, SealFlags::GROW] {
        let fd = memfd_create("test", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        fcntl_add_seals(&fd, immutable - missing).unwrap();
        let refused = SealedMemfd::try_from(fd.try_clone().unwrap()).unwrap_err();
        assert!(matches!(refused, Error::Argument(_)), "{refused:?}");
        fcntl_add_seals(&fd, missing).unwrap();
        assert!(SealedMemfd::try_from(fd).is_ok());
    }
    // Whoever mapped it before could still write.
    let fd = memfd_create("test", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
    fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW).unwrap();
    assert!(SealedMemfd::try_from(fd).is_err());
    let (reader, _writer) = std::io::pipe().unwrap();
    assert!(SealedMemfd::try_from(std::os::fd::OwnedFd::from(reader)).is_err());
}

#[test]
fn a_model_in_sealed_memory_does_not_care_what_becomes_of_its_file() {
    let dir = disk_dir();
    let path = dir.path().join("model.safetensors");
    let bytes = model(&path, 3 * MIB);
    let sealed = OpenOptions::new().read_sealed(&path).unwrap();
    let mut edited = OpenOptions::new().dense_edits(true).read_sealed_mut(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert!(sealed.tensor("big").unwrap().as_bytes() == noise(1, 3 * MIB));
    edited.tensor_mut("big").unwrap().as_mut_slice::<f32>().unwrap()[7] = 1.5;
    assert_eq!(edited.changed().unwrap().elements(), 1);
    edited.mark().unwrap();
    assert!(edited.changed().unwrap().is_empty());
    let found = region(edited.mapping(0).unwrap());
    assert!(found.path.starts_with("/memfd:"), "{found:?}");
    // From a descriptor, as another process would send it.
    let mut memfd = Memfd::create("sent", bytes.len()).unwrap();
    memfd.as_bytes_mut().copy_from_slice(&bytes);
    let sent = memfd.seal().unwrap();
    let received = SealedMemfd::try_from(sent.as_fd().try_clone_to_owned().unwrap()).unwrap();
    drop(sent);
    let model = OpenOptions::new().over(&received).unwrap();
    assert!(model.tensor("big").unwrap().as_bytes() == noise(1, 3 * MIB));
    let mut model = OpenOptions::new().over_mut(&received).unwrap();
    model.tensor_mut("small").unwrap().as_bytes_mut().fill(9);
    assert_eq!(model.changed().unwrap().elements(), 3);
}

#[test]
fn sealing_does_not_mind_a_child_that_is_just_being_forked() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::process::CommandExt as _;
    let memfd = Memfd::create("m", MIB).unwrap();
    let (mut told, forked) = std::io::pipe().unwrap();
    let mut command = std::process::Command::new("true");
    // SAFETY: writing a byte and sleeping are allowed between fork(2) and execve(2).
    unsafe {
        command.pre_exec(move || {
            (&forked).write_all(&[1])?;
            std::thread::sleep(std::time::Duration::from_millis(200));
            Ok(())
        });
    }
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(command.status().unwrap().success()));
        told.read_exact(&mut [0]).unwrap();
        assert_eq!(memfd.seal().unwrap().len().unwrap(), MIB as u64);
    });
}

#[test]
fn a_models_options_reach_its_mapping() {
    let dir = disk_dir();
    let path = dir.path().join("model.safetensors");
    model(&path, 3 * MIB);
    let options = OpenOptions::new().lock(true).huge_pages(false).reserve_swap(true);
    // SAFETY: a file of the test's own, which nobody writes meanwhile.
    let edited = || unsafe { options.open_mut(&path) }.unwrap();
    let is_there = common::soon(|| {
        let edited = edited();
        let found = region(edited.mapping(0).unwrap());
        assert!(["lo", "nh", "ac"].iter().all(|flag| found.has(flag)), "{found:?}");
        (found.size("Anonymous"), found.size("Locked")) == (0, found.end - found.start)
    });
    assert!(is_there);
    let read = options.read(&path).unwrap();
    let found = region(read.mapping(0).unwrap());
    assert!(["lo", "nh"].iter().all(|flag| found.has(flag)), "{found:?}");
    let sealed = options.read_sealed(&path).unwrap();
    assert!(region(sealed.mapping(0).unwrap()).has("lo"));
}
