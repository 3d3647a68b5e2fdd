//! A save that fails or is killed leaves the old file whole and nothing else; one that succeeds replaces it
//! in one step.
#![allow(unsafe_code)]

use maptensors::{DType, Draft, DraftOptions, Error, Layout, Model, SaveOptions, SaveTensor, TensorBytes};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::common::mount::Mount;
use crate::common::{self, bytes_tensor, listing, sha256_of};

const MIB: usize = 1 << 20;

/// Two tensors, every byte of which says the generation.
fn save_generation(options: &SaveOptions, path: &Path, generation: u8, len: usize) -> Result<(), Error> {
    let (a, b) = (vec![generation; len], vec![generation; len / 3]);
    let tensors = [("a", bytes_tensor(&a)), ("b", bytes_tensor(&b))];
    options.clone().metadata("generation", generation.to_string()).save(tensors, path)
}

/// The generation of a whole model; fails on a mixture.
fn generation(model: &Model) -> u8 {
    let first = model.tensor("a").unwrap().as_bytes()[0];
    for tensor in model.tensors() {
        assert!(tensor.as_bytes().iter().all(|&b| b == first), "a mixture of generations");
    }
    assert_eq!(model.len(), 2);
    assert_eq!(model.metadata()["generation"], first.to_string());
    first
}

fn is_io(result: Result<(), Error>) -> std::io::Error {
    match result {
        Err(Error::Io { path, source, .. }) => {
            assert!(!path.as_os_str().is_empty());
            source
        }
        other => panic!("expected an Io error, got {other:?}"),
    }
}

fn mode_of(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn what_is_no_regular_file_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("dir")).unwrap();
    common::fifo(&at("fifo"));
    symlink("/dev/null", at("link")).unwrap();
    let before = listing(dir.path());
    for (path, expected) in [
        (at("dir"), "NotRegular"),
        (at("fifo"), "NotRegular"),
        (at("link"), "NotRegular"),
        ("/dev/null".into(), "NotRegular"),
        (at("gone/file"), "Io"),
        (at(".."), "Argument"),
        ("/".into(), "Argument"),
        (at("a\0b"), "Io"),
        (at(&"x".repeat(256)), "Io"),
    ] {
        let error = save_generation(&SaveOptions::new(), &path, 1, 100).unwrap_err();
        assert_eq!(error.kind().name(), expected, "{}: {error}", path.display());
    }
    assert_eq!(listing(dir.path()), before);
    assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    assert_eq!(
        Draft::create(at("dir"), &Layout::builder().build().unwrap()).unwrap_err().kind().name(),
        "NotRegular"
    );
}

#[test]
fn a_link_is_replaced_and_what_it_led_to_stays() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    save_generation(&SaveOptions::new(), &at("target"), 1, 100).unwrap();
    std::fs::hard_link(at("target"), at("hard")).unwrap();
    symlink("target", at("soft")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    let before = sha256_of(&at("target"));
    for name in ["soft", "dangling", "hard"] {
        save_generation(&SaveOptions::new(), &at(name), 2, 100).unwrap();
        assert!(at(name).symlink_metadata().unwrap().is_file(), "{name}");
        assert_eq!(generation(&Model::read(at(name)).unwrap()), 2);
    }
    assert_eq!(sha256_of(&at("target")), before, "target of the link, peer of the hard link");
    assert!(!at("nowhere").exists());
}

#[test]
fn a_replacement_keeps_its_mode_and_a_new_file_takes_the_umask() {
    const TEST: &str = "a_replacement_keeps_its_mode_and_a_new_file_takes_the_umask";
    if let Some(dir) = common::role("umask") {
        for (mask, expected) in [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)] {
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(mask));
            let path = dir.join(format!("new-{mask:o}"));
            save_generation(&SaveOptions::new(), &path, 1, 100).unwrap();
            assert_eq!(mode_of(&path), expected, "umask {mask:o}");
            for mode in [0o640, 0o600, 0o444, 0o666] {
                std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
                save_generation(&SaveOptions::new(), &path, 2, 100).unwrap();
                assert_eq!(mode_of(&path), mode, "umask {mask:o}");
            }
        }
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    common::pass(common::child(TEST, "umask", dir.path())); // the umask is the whole process'
}

#[test]
fn a_name_of_255_bytes_works() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("n".repeat(255));
    for i in [1, 2] {
        save_generation(&SaveOptions::new(), &path, i, 100).unwrap();
        assert_eq!(generation(&Model::read(&path).unwrap()), i);
    }
    assert_eq!(listing(dir.path()).len(), 1);
}

#[test]
fn a_read_only_directory_is_an_error() {
    const TEST: &str = "a_read_only_directory_is_an_error";
    if let Some(dir) = common::role("nobody") {
        let path = dir.join("model.safetensors");
        for options in [SaveOptions::new(), SaveOptions::new().max_shard_size(100)] {
            let error = is_io(save_generation(&options, &path, 2, 100));
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        }
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    save_generation(&SaveOptions::new(), &path, 1, 100).unwrap();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o555)).unwrap();
    let (command, _exe) = common::unprivileged_child(TEST, "nobody", dir.path());
    common::pass(command);
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    assert_eq!(generation(&Model::read(&path).unwrap()), 1);
    assert_eq!(listing(dir.path()), ["model.safetensors"]);
}

#[test]
fn a_file_over_the_size_limit_is_an_error_and_no_signal() {
    const TEST: &str = "a_file_over_the_size_limit_is_an_error_and_no_signal";
    if let Some(dir) = common::role("limited") {
        let path = dir.join("model.safetensors");
        save_generation(&SaveOptions::new(), &path, 1, 1000).unwrap();
        setrlimit(Resource::Fsize, Rlimit { current: Some(64 << 10), maximum: None }).unwrap();
        for mapped in [true, false] {
            for options in [SaveOptions::new(), SaveOptions::new().max_shard_size(500_000)] {
                let error = is_io(save_generation(&options.mapped(mapped), &path, 2, MIB));
                assert_eq!(error.kind(), std::io::ErrorKind::FileTooLarge);
                assert_eq!(generation(&Model::read(&path).unwrap()), 1);
                assert_eq!(listing(&dir), ["model.safetensors"]);
            }
        }
        save_generation(&SaveOptions::new(), &path, 3, 1000).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    common::pass(common::child(TEST, "limited", dir.path()));
    assert_eq!(generation(&Model::read(dir.path().join("model.safetensors")).unwrap()), 3);
}

#[test]
fn of_two_savers_one_wins_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for round in 0..20 {
        let options = SaveOptions::new().durable(round % 4 == 0).mapped(round % 2 == 0);
        std::thread::scope(|scope| {
            for i in 1..=4 {
                let (options, path) = (&options, &path);
                scope.spawn(move || save_generation(options, path, i, 300_000).unwrap());
            }
        });
        assert!((1..=4).contains(&generation(&Model::read(&path).unwrap())));
        assert_eq!(listing(dir.path()), ["model.safetensors"]);
    }
}

#[test]
fn of_two_sharded_savers_one_wins_whole() {
    let options = SaveOptions::new().durable(false).max_shard_size(100_000);
    for _ in 0..30 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        std::thread::scope(|scope| {
            for i in 1..=3 {
                let (options, path) = (&options, &path);
                scope.spawn(move || save_generation(options, path, i, 200_000).unwrap());
            }
        });
        assert!((1..=3).contains(&generation(&Model::read(dir.path()).unwrap())));
        // What is there is the winner's set: its index, and the shards that this names.
        let index = std::fs::read(dir.path().join("m.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let shards = index["weight_map"].as_object().unwrap().values();
        let mut expected: BTreeSet<&str> = shards.map(|shard| shard.as_str().unwrap()).collect();
        assert_eq!(expected.len(), 2);
        expected.insert("m.safetensors.index.json");
        assert_eq!(listing(dir.path()), Vec::from_iter(expected));
    }
}

#[test]
fn stale_temporaries_are_swept_and_live_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::builder().tensor("w", DType::U8, &[100]).build().unwrap();
    let stale = dir.path().join(".maptensors-00112233445566aa.tmp");
    std::fs::write(&stale, b"left by a crash of another boot, days ago").unwrap();
    let days_ago = std::time::SystemTime::now() - Duration::from_secs(3 * 24 * 60 * 60);
    std::fs::File::options().write(true).open(&stale).unwrap().set_modified(days_ago).unwrap();
    std::fs::write(dir.path().join(".other.tmp"), b"not ours").unwrap();
    let mut draft = Draft::create(dir.path().join("draft"), &layout).unwrap();
    assert!(!stale.exists());
    assert_eq!(listing(dir.path()), [".other.tmp"], "the draft's has no name");
    save_generation(&SaveOptions::new(), &dir.path().join("model"), 1, 100).unwrap();
    draft.tensor_mut("w").unwrap().as_bytes_mut().fill(9);
    draft.commit().unwrap();
    assert_eq!(listing(dir.path()), [".other.tmp", "draft", "model"]);
    assert_eq!(Model::read(dir.path().join("draft")).unwrap().tensor("w").unwrap().as_bytes(), [9; 100]);
}

#[test]
fn a_draft_is_invisible_until_committed_and_leaves_nothing_when_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    save_generation(&SaveOptions::new(), &path, 1, 100).unwrap();
    let layout = Layout::builder().tensor("w", DType::U8, &[100]).build().unwrap();
    for mapped in [true, false] {
        let mut draft = DraftOptions::new().mapped(mapped).create(&path, &layout).unwrap();
        assert_eq!(draft.is_mapped(), mapped);
        draft.tensor_mut("w").unwrap().as_bytes_mut().fill(9);
        assert_eq!(draft.tensor_mut("v").unwrap_err().kind().name(), "Missing");
        assert_eq!(generation(&Model::read(&path).unwrap()), 1);
        drop(draft);
        assert_eq!(listing(dir.path()), ["model.safetensors"]);
        assert_eq!(generation(&Model::read(&path).unwrap()), 1);
    }
    // A save whose tensors contradict themselves fails before and after planning alike.
    let twice = [("a", bytes_tensor(&[1])), ("a", bytes_tensor(&[2]))];
    assert_eq!(maptensors::save(twice, &path).unwrap_err().kind().name(), "Duplicate");
    assert_eq!(listing(dir.path()), ["model.safetensors"]);
}

#[test]
fn with_and_without_a_map_a_draft_makes_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let make = |mapped: bool, touch: bool| {
        let path = dir.path().join(format!("{mapped}-{touch}"));
        let layout = Layout::builder().tensor("a", DType::F32, &[700_001]).tensor("b", DType::U8, &[3]);
        let mut draft = DraftOptions::new().mapped(mapped).create(&path, &layout.build().unwrap()).unwrap();
        if touch {
            draft.tensor_mut("a").unwrap().as_bytes_mut().copy_from_slice(&common::noise(1, 2_800_004));
        }
        draft.commit().unwrap();
        sha256_of(&path)
    };
    assert_eq!(make(true, true), make(false, true));
    assert_eq!(make(true, false), make(false, false), "zeros where nothing was filled");
    assert_ne!(make(true, true), make(true, false));
}

/// A full disk under a save of any kind: an error, the old file, and nothing else.
fn fill_up(dir: &Path, mapped: bool) {
    let dir = dir.join("models");
    std::fs::create_dir(&dir).unwrap();
    let path = dir.join("model.safetensors");
    save_generation(&SaveOptions::new(), &path, 1, MIB).unwrap();
    let tiny = Layout::builder().tensor("w", DType::U8, &[10]).build().unwrap();
    let draft = Draft::create(dir.join("tiny"), &tiny).unwrap();
    assert_eq!(draft.is_mapped(), mapped, "whether this file system can allocate space");
    drop(draft);
    for asked in [true, false] {
        for options in [SaveOptions::new(), SaveOptions::new().max_shard_size(15 * MIB as u64)] {
            let error = is_io(save_generation(&options.mapped(asked), &path, 2, 13 * MIB));
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
            assert_eq!(generation(&Model::read(&path).unwrap()), 1);
            assert_eq!(listing(&dir), ["model.safetensors"]);
        }
    }
    // There is room again, once the file system has counted what was freed.
    let again = (0..100).any(|_| {
        rustix::fs::sync();
        let saved = save_generation(&SaveOptions::new(), &path, 3, 2 * MIB).is_ok();
        std::thread::sleep(Duration::from_millis(if saved { 0 } else { 20 }));
        saved
    });
    assert!(again && generation(&Model::read(&path).unwrap()) == 3);
    let large = Layout::builder().tensor("w", DType::U8, &[14 * MIB]).build().unwrap();
    let failed = Draft::create(&path, &large).and_then(|mut draft| {
        draft.tensor_mut("w")?.as_bytes_mut().fill(1);
        draft.commit()
    });
    assert_eq!(is_io(failed).kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(listing(&dir), ["model.safetensors"]);
}

#[test]
fn a_full_disk_is_an_error() {
    let mkfs = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0"];
    if let Some(mount) = Mount::new("a_full_disk_is_an_error", &mkfs, 14 << 20) {
        fill_up(&mount.path(), true);
    }
}

#[test]
fn a_full_disk_that_cannot_allocate_ahead_is_an_error() {
    // ext2's block maps know no preallocation: fallocate(2) answers EOPNOTSUPP.
    let mkfs = ["mkfs.ext2", "-q", "-F", "-m", "0"];
    if let Some(mount) = Mount::new("a_full_disk_that_cannot_allocate_ahead_is_an_error", &mkfs, 14 << 20) {
        fill_up(&mount.path(), false);
    }
}

#[test]
fn without_allocation_the_same_bytes_are_written() {
    let mkfs = ["mkfs.ext2", "-q", "-F"];
    let Some(mount) = Mount::new("without_allocation_the_same_bytes_are_written", &mkfs, 32 << 20) else {
        return;
    };
    let elsewhere = common::disk_dir();
    let save = |dir: &Path| {
        let (a, b) = (common::noise(1, 5 * MIB + 3), common::noise(2, 4096));
        maptensors::save([("a", bytes_tensor(&a)), ("b", bytes_tensor(&b))], dir.join("m")).unwrap();
        sha256_of(&dir.join("m"))
    };
    assert_eq!(save(&mount.path()), save(elsewhere.path()));
}

fn kills() -> u32 {
    std::env::var("MAPTENSORS_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(120)
}

/// Runs `test` as a child that saves without end, kills it at some instant, and calls `check`; again and
/// again. Returns how often it was caught in a save.
fn kill_savers(test: &str, dir: &Path, mut check: impl FnMut()) -> u32 {
    let (mut caught, first) = (0, common::seed(test));
    for seed in (0..kills()).map(|kill| first.wrapping_add(kill.into())) {
        let mut child =
            common::child(test, "saver", dir).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let started = dir.join("started");
        while !started.exists() {
            assert!(child.try_wait().unwrap().is_none(), "the saver ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        let instant = u64::from_le_bytes(common::noise(seed, 8).try_into().unwrap()) % 20_000;
        std::thread::sleep(Duration::from_micros(instant));
        child.kill().unwrap(); // SIGKILL
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
        let saving = dir.join("saving");
        caught += u32::from(saving.exists());
        std::fs::remove_file(saving).ok();
        check();
        std::fs::remove_file(started).unwrap();
    }
    caught
}

fn temporaries(dir: &Path) -> usize {
    listing(dir).iter().filter(|name| name.starts_with(".maptensors-")).count()
}

#[test]
fn a_killed_saver_leaves_the_old_file_or_the_new_one() {
    const TEST: &str = "a_killed_saver_leaves_the_old_file_or_the_new_one";
    if let Some(dir) = common::role("saver") {
        let path = dir.join("set/model.safetensors");
        for i in 1u64.. {
            let options = SaveOptions::new().durable(i % 16 == 0).mapped(i % 2 == 0);
            std::fs::write(dir.join("saving"), b"").unwrap();
            save_generation(&options, &path, u8::try_from(i % 256).unwrap(), 700_000).unwrap();
            std::fs::remove_file(dir.join("saving")).unwrap();
            std::fs::write(dir.join("started"), b"").unwrap();
        }
    }
    let dir = common::disk_dir();
    let set = dir.path().join("set");
    std::fs::create_dir(&set).unwrap();
    let path = set.join("model.safetensors");
    save_generation(&SaveOptions::new(), &path, 0, 700_000).unwrap();
    let mut left = 0;
    let done = std::sync::atomic::AtomicBool::new(false);
    let (caught, reads) = std::thread::scope(|scope| {
        // All the while somebody reads, and never sees anything but a whole file.
        let reader = scope.spawn(|| {
            let mut reads = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let model = if reads % 2 == 0 {
                    Model::read(&path)
                } else {
                    // SAFETY: savers rename new files over this one, and write into none that had its name.
                    unsafe { Model::open(&path) }
                };
                generation(&model.unwrap());
                reads += 1;
            }
            reads
        });
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            kill_savers(TEST, dir.path(), || {
                generation(&Model::read(&path).unwrap());
                left += temporaries(&set);
            })
        }));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        (caught, reader.join())
    });
    let (caught, reads) = (caught.unwrap(), reads.unwrap());
    println!("a file: {} kills, {caught} of them in a save, {left} left; {reads} reads meanwhile", kills());
    // A name is there only between link(2) and rename(2).
    assert!(u32::try_from(left).unwrap() < kills(), "{left} unfinished files after {} kills", kills());
    assert!(caught > 0, "no kill hit an unfinished save");
    assert!(reads > kills());
    save_generation(&SaveOptions::new(), &path, 1, 100).unwrap();
    assert_eq!(listing(&set), ["model.safetensors"], "what killed savers left is swept");
}

#[test]
fn a_killed_sharded_save_leaves_one_whole_set() {
    const TEST: &str = "a_killed_sharded_save_leaves_one_whole_set";
    let options = SaveOptions::new().max_shard_size(100_000);
    if let Some(dir) = common::role("saver") {
        for i in 1u64.. {
            let generation = u8::try_from(i % 256).unwrap();
            std::fs::write(dir.join("saving"), b"").unwrap();
            save_generation(
                &options.clone().durable(false),
                &dir.join("set/m.safetensors"),
                generation,
                200_000,
            )
            .unwrap();
            std::fs::remove_file(dir.join("saving")).unwrap();
            std::fs::write(dir.join("started"), b"").unwrap();
        }
    }
    let dir = common::disk_dir();
    let set = dir.path().join("set");
    std::fs::create_dir(&set).unwrap();
    save_generation(&options, &set.join("m.safetensors"), 0, 200_000).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let (caught, reads) = std::thread::scope(|scope| {
        // Who reads while a set is replaced may find an index whose shards have just gone, and reads again;
        // but never a mixture.
        let reader = scope.spawn(|| {
            let (mut whole, mut gone) = (0, 0);
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                match Model::read(&set) {
                    Ok(model) => {
                        generation(&model);
                        whole += 1;
                    }
                    Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                        gone += 1;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            (whole, gone)
        });
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            kill_savers(TEST, dir.path(), || {
                let model = Model::read(&set).unwrap();
                assert_eq!(model.shards(), 2);
                generation(&model);
            })
        }));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        (caught, reader.join())
    });
    let (caught, (whole, gone)) = (caught.unwrap(), reads.unwrap());
    println!(
        "a set: {} kills, {caught} of them in a save; {whole} reads meanwhile, {gone} came too late",
        kills()
    );
    assert!(caught > 0, "no kill hit an unfinished save");
    assert!(whole > kills());
}

/// A tensor that says one thing and may hold another.
struct Declared {
    shape: [usize; 1],
    data: Vec<u8>,
}

impl SaveTensor for Declared {
    fn dtype(&self) -> DType {
        DType::U8
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn bytes(&self) -> TensorBytes<'_> {
        self.data.as_slice().into()
    }
}

#[test]
fn an_old_index_that_names_other_files_does_not_have_them_removed() {
    let dir = tempfile::tempdir().unwrap();
    let index = dir.path().join("m.safetensors.index.json");
    for name in ["config.json", "other.safetensors", "m.txt", "m-notes.txt"] {
        std::fs::write(dir.path().join(name), b"mine").unwrap();
    }
    let listed =
        r#"{"weight_map":{"a":"config.json","b":"other.safetensors","c":"m.txt","d":"m-notes.txt"}}"#;
    for limit in [100_000, 1 << 40] {
        std::fs::write(&index, listed).unwrap();
        let options = SaveOptions::new().max_shard_size(limit);
        save_generation(&options, &dir.path().join("m.safetensors"), 1, 200_000).unwrap();
        for name in ["config.json", "other.safetensors", "m.txt", "m-notes.txt"] {
            assert!(dir.path().join(name).exists(), "{name}");
        }
    }
}

#[test]
fn a_sharded_save_replaces_the_set_and_a_failing_one_leaves_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let sharded = SaveOptions::new().max_shard_size(100_000);
    save_generation(&sharded, &path, 1, 200_000).unwrap();
    let first = listing(dir.path());
    assert_eq!(
        first,
        ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"]
    );

    let before: Vec<_> = first.iter().map(|name| sha256_of(&dir.path().join(name))).collect();
    let part = |name, data_len| (name, Declared { shape: [200_000], data: vec![2; data_len] });
    let good = |name| part(name, 200_000);
    for (tensors, expected) in [
        (vec![good("a"), good("b"), part("c", 100)], "Shape"), // the last is not as long as it says
        (vec![good("a"), good("b"), good("a")], "Duplicate"),
    ] {
        assert_eq!(sharded.save(tensors, &path).unwrap_err().kind().name(), expected);
        assert_eq!(listing(dir.path()), first, "{expected}: nothing left behind");
        let after: Vec<_> = first.iter().map(|name| sha256_of(&dir.path().join(name))).collect();
        assert_eq!(after, before, "{expected}");
    }
    // The index cannot be replaced: the shards already in place go again.
    let index = dir.path().join("m.safetensors.index.json");
    std::fs::rename(&index, dir.path().join("kept")).unwrap();
    std::fs::create_dir(&index).unwrap();
    assert_eq!(save_generation(&sharded, &path, 2, 200_000).unwrap_err().kind().name(), "NotRegular");
    std::fs::remove_dir(&index).unwrap();
    std::fs::rename(dir.path().join("kept"), &index).unwrap();
    assert_eq!(listing(dir.path()), first);

    save_generation(&sharded, &path, 3, 200_000).unwrap();
    assert_eq!(generation(&Model::read(dir.path()).unwrap()), 3);
    assert_eq!(listing(dir.path()).len(), 3, "the old shards went");
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 266_666);

    // What fits one file becomes one, and no stale index hides it.
    save_generation(&SaveOptions::new().max_shard_size(1 << 40), &path, 4, 100).unwrap();
    assert_eq!(listing(dir.path()), ["m.safetensors"]);
    assert_eq!(generation(&Model::read(dir.path()).unwrap()), 4);
}

#[test]
fn whatever_saves_a_whole_file_has_the_set_of_its_name_go_and_nothing_else() {
    type Save = fn(&Path);
    let plain: Save = |path| save_generation(&SaveOptions::new(), path, 2, 100).unwrap();
    let quick: Save = |path| save_generation(&SaveOptions::new().durable(false), path, 2, 100).unwrap();
    let model: Save = |path| {
        let dir = tempfile::tempdir().unwrap();
        save_generation(&SaveOptions::new(), &dir.path().join("m"), 2, 100).unwrap();
        Model::read(dir.path().join("m")).unwrap().save(path).unwrap();
    };
    for (stem, save) in [("model", plain), ("m", plain), ("m", quick), ("m", model)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("{stem}.safetensors"));
        save_generation(&SaveOptions::new().max_shard_size(100_000), &path, 1, 200_000).unwrap();
        assert_eq!(listing(dir.path()).len(), 3);
        let mine = ["config.json", "notes-00001-of-00002.safetensors.txt"];
        for name in mine {
            std::fs::write(dir.path().join(name), b"mine").unwrap();
        }
        let held = Model::read(dir.path()).unwrap();
        save(&path);
        assert_eq!(generation(&held), 1);
        let mut left = vec![format!("{stem}.safetensors")];
        left.extend(mine.map(str::to_owned));
        left.sort();
        assert_eq!(listing(dir.path()), left);
        assert_eq!(generation(&Model::read(&path).unwrap()), 2);
    }
}

#[test]
fn a_whole_file_and_a_set_that_are_saved_at_once_leave_one_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let quick = || SaveOptions::new().durable(false);
    for round in 1..=20 {
        std::thread::scope(|scope| {
            scope.spawn(|| save_generation(&quick(), &path, 2 * round, 2000).unwrap());
            scope.spawn(|| {
                save_generation(&quick().max_shard_size(1000), &path, 2 * round + 1, 2000).unwrap();
            });
        });
        let found = generation(&Model::read(dir.path()).unwrap());
        assert!([2 * round, 2 * round + 1].contains(&found), "{found} in round {round}");
        let names = listing(dir.path());
        assert!(names.len() == 1 || !names.contains(&"model.safetensors".to_owned()), "{names:?}");
    }
}
