//! Publications as one finds them: what was left behind is seen and removed, and nobody is disturbed.
#![allow(unsafe_code)]
#![cfg(target_os = "linux")]

use maptensors::{AttachOptions, DType, Error, Publication, Publisher, SaveTensor, Subscriber, TensorBytes};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{self, bytes_tensor, listing};

const MIB: usize = 1 << 20;

/// What the files of a directory take, by the kernel's word.
fn taken(place: &Path) -> u64 {
    let blocks = |name: &String| fs::symlink_metadata(place.join(name)).unwrap().blocks();
    listing(place).iter().map(blocks).sum::<u64>() * 512
}

/// As an unfinished file is called that a process of this boot has left.
fn unfinished() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    format!(".maptensors-{}-0123456789abcdef.tmp", &boot[..8])
}

/// This test again, as a process to which names stand for what lies in `base`.
fn named(test: &str, base: &Path) {
    let mut child = common::child(test, "named", base);
    child.env("MAPTENSORS_SHARE_DIR", base);
    common::pass(child);
}

fn names(found: &[Publication]) -> Vec<&str> {
    found.iter().map(|found| found.name.as_deref().unwrap()).collect()
}

#[test]
fn what_has_a_name_is_found_with_what_it_takes_and_looking_makes_nothing() {
    const TEST: &str = "what_has_a_name_is_found_with_what_it_takes_and_looking_makes_nothing";
    let Some(base) = common::role("named") else {
        let dir = tempfile::tempdir().unwrap();
        return named(TEST, &dir.path().join("base"));
    };
    assert!(Publication::all().unwrap().is_empty());
    let error = Publication::at("policy").unwrap_err();
    assert!(matches!(&error, Error::Publication { .. }), "{error}");
    assert!(matches!(Publication::at("../policy"), Err(Error::Publication { .. })), "a path");
    assert!(matches!(Publication::at(".policy"), Err(Error::Argument(_))));
    assert!(!base.exists(), "only looked");

    let (a, b) = (vec![1; MIB], vec![2; 2 * MIB]);
    let mut policy = Publisher::open("policy").unwrap();
    let begun = Publication::at("policy").unwrap();
    assert_eq!((begun.generation, begun.tensors, begun.published), (0, 0, None));
    assert!(begun.publishing && begun.damage.is_none() && begun.process == u64::from(std::process::id()));
    policy.publish([("a", bytes_tensor(&a)), ("b", bytes_tensor(&b))]).unwrap();
    let before = std::time::SystemTime::now() - Duration::from_secs(3600);
    policy.publish_changed([("a", bytes_tensor(&b)), ("c", bytes_tensor(&a))]).unwrap();
    common::begun("old");
    // What no publisher made is nobody's publication, and nothing is looked at behind a link.
    let elsewhere = base.with_file_name("elsewhere");
    common::begun(&elsewhere);
    symlink(&elsewhere, base.join("link")).unwrap();
    fs::write(base.join("file"), b"").unwrap();
    fs::create_dir(base.join("empty")).unwrap();
    fs::create_dir(base.join("foreign")).unwrap();
    fs::write(base.join("foreign/model.safetensors"), b"").unwrap();
    fs::create_dir(base.join(".hidden")).unwrap();
    fs::copy(base.join("policy/control"), base.join(".hidden/control")).unwrap();
    let found = Publication::all().unwrap();
    assert_eq!(names(&found), ["old", "policy"]);
    let (old, found) = (&found[0], &found[1]);
    assert_eq!((old.generation, old.publishing, old.allocated), (0, false, taken(&old.path)));
    assert_eq!((found.generation, found.tensors, found.nbytes), (2, 3, 5 * MIB as u64));
    assert_eq!((found.allocated, &found.path), (taken(&found.path), &base.join("policy")));
    assert!(found.publishing && found.published.unwrap() > before && found.damage.is_none());
    assert_eq!((found.spare, found.unfinished), (0, 0));
    assert_eq!(Publication::at("policy").unwrap(), *found);
    assert!(Publication::at("link").is_err() && Publication::at("empty").is_err());

    // All of it anew: what the generation before had is kept, to be written again.
    policy.publish([("a", bytes_tensor(&a))]).unwrap();
    let found = Publication::at("policy").unwrap();
    assert!(found.spare >= 3 * MIB as u64 && found.nbytes == MIB as u64, "{found:?}");
    fs::write(base.join("policy").join(unfinished()), vec![1; MIB]).unwrap();
    assert!(Publication::at("policy").unwrap().unfinished >= MIB as u64);

    assert!(matches!(found.remove(), Err(Error::Busy { .. })));
    assert_eq!(policy.generation(), 3);
    drop(policy);
    let found = Publication::at("policy").unwrap();
    assert!(!found.publishing && found.unfinished >= MIB as u64 && found.process == begun.process);
    assert_eq!(found.remove().unwrap(), found.allocated);
    assert!(!base.join("policy").exists());
    let gone = found.remove().unwrap_err();
    assert!(gone.to_string().contains("nothing is published"), "{gone}");
    assert_eq!(listing(&elsewhere), ["control"]);
    old.remove().unwrap();
    assert!(Publication::all().unwrap().is_empty());
    assert_eq!(listing(&base), [".hidden", "empty", "file", "foreign", "link"], "what is others' stays");
}

/// A tensor whose data takes for ever to come.
struct Endless<'a>(&'a Path);

impl SaveTensor for Endless<'_> {
    fn dtype(&self) -> DType {
        DType::U8
    }

    fn shape(&self) -> &[usize] {
        &[8 * MIB]
    }

    fn bytes(&self) -> TensorBytes<'_> {
        TensorBytes::written(|_| {
            fs::write(self.0, b"").unwrap();
            loop {
                std::thread::park();
            }
        })
    }
}

#[test]
fn what_a_publisher_left_that_was_killed_is_found_and_freed() {
    const TEST: &str = "what_a_publisher_left_that_was_killed_is_found_and_freed";
    if let Some(dir) = common::role("publisher") {
        let mut publisher = Publisher::open(dir.join("p")).unwrap();
        // The third generation goes into the first one's file, which keeps a name; a new file has none to be found by.
        for _ in 0..2 {
            publisher.publish([("a", bytes_tensor(&vec![1; MIB]))]).unwrap();
        }
        publisher.publish([("a", Endless(&dir.join("writing")))]).unwrap();
    }
    let dir = common::recycling_dir();
    let place = dir.path().join("p");
    let mut command = common::child(TEST, "publisher", dir.path());
    let mut child = common::Process(command.stdout(Stdio::null()).spawn().unwrap());
    while !dir.path().join("writing").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(Duration::from_millis(2));
    }
    let living = Publication::at(&place).unwrap();
    assert!(living.publishing && living.process == u64::from(child.id()), "{living:?}");
    assert!(living.unfinished >= 8 * MIB as u64, "{living:?}");
    let busy = living.remove().unwrap_err();
    assert!(
        matches!(busy, Error::Busy { .. }) && busy.to_string().contains(&child.id().to_string()),
        "{busy}"
    );
    drop(child);
    let left = Publication::at(&place).unwrap();
    let mut expected = living;
    expected.publishing = false;
    assert_eq!(left, expected, "only looked at");
    assert_eq!(left.allocated, taken(&place));
    assert!(left.remove().unwrap() >= 9 * MIB as u64);
    assert!(!place.exists());
}

#[test]
fn who_looks_is_in_no_publishers_way() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let lookers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = 0;
                    while !done.load(Ordering::Relaxed) {
                        // Before the first publisher came, or between two of them.
                        let Ok(found) = Publication::at(&place) else { continue };
                        assert_eq!(found.damage, None);
                        assert_eq!(found.tensors, usize::from(found.generation > 0));
                        seen += 1;
                    }
                    seen
                })
            })
            .collect();
        let published = std::panic::catch_unwind(|| {
            for round in 0..400u64 {
                let mut publisher = Publisher::open(&place).unwrap();
                assert_eq!(publisher.publish([("a", bytes_tensor(&[1; 5000]))]).unwrap(), round % 20 + 1);
                if round % 20 == 19 {
                    publisher.remove().unwrap();
                }
            }
        });
        done.store(true, Ordering::Relaxed);
        let seen: Vec<u32> = lookers.into_iter().map(|looker| looker.join().unwrap()).collect();
        published.unwrap();
        seen
    });
    assert!(seen.iter().all(|&seen| seen > 0), "{seen:?}");
}

/// A publication of three segments, that nobody publishes.
fn published(place: &Path) {
    let mut publisher = Publisher::open(place).unwrap();
    for value in 0..3 {
        publisher.publish_changed([(format!("t{value}"), bytes_tensor(&[value; 5000]))]).unwrap();
    }
}

fn segments(place: &Path) -> Vec<PathBuf> {
    let names = listing(place).into_iter().filter(|name| name.ends_with(".safetensors"));
    names.map(|name| place.join(name)).collect()
}

/// What is done to a publication.
type Make = fn(&Path);

/// A name for a damage, how it is done, and what is said of it then.
type Damage = (&'static str, Make, &'static str);

const DAMAGES: &[Damage] = &[
    ("garbage", |p| fs::write(p.join("control"), [7; 4096]).unwrap(), "control page makes no sense"),
    (
        "short",
        |p| File::options().write(true).open(p.join("control")).unwrap().set_len(20).unwrap(),
        "no sense",
    ),
    ("torn", |p| overwrite(p, 16, &[1; 4]), "control page makes no sense"),
    ("removing", |p| overwrite(p, 32, &[1]), "removal"),
    ("pageless", |p| fs::remove_file(p.join("control")).unwrap(), "no control page"),
    ("fifo", |p| replace(&p.join("control"), common::fifo), "no file"),
    ("page-dir", |p| replace(&p.join("control"), |c| fs::create_dir(c).unwrap()), "no file"),
    ("page-link", |p| replace(&p.join("control"), |c| symlink(outside(p), c).unwrap()), "opening"),
    ("headless", |p| fs::remove_file(segments(p).pop().unwrap()).unwrap(), "is missing"),
    ("gap", |p| fs::remove_file(&segments(p)[0]).unwrap(), "is missing"),
    ("segment-link", |p| replace(&segments(p)[0], |s| symlink(outside(p), s).unwrap()), "opening a segment"),
    ("segment-fifo", |p| replace(&segments(p)[0], common::fifo), "not a regular file"),
    ("segment-garbage", |p| fs::write(&segments(p)[0], [0xff; 100]).unwrap(), "limit"),
];

fn overwrite(place: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(place.join("control")).unwrap().write_all_at(bytes, at).unwrap();
}

fn replace(path: &Path, with: impl FnOnce(&Path)) {
    fs::remove_file(path).unwrap();
    with(path);
}

/// What no link may lead to.
fn outside(place: &Path) -> PathBuf {
    let outside = place.parent().unwrap().with_file_name("outside");
    fs::write(&outside, b"mine").unwrap();
    outside
}

#[test]
fn a_damaged_one_is_listed_with_what_is_wrong_and_can_be_removed() {
    const TEST: &str = "a_damaged_one_is_listed_with_what_is_wrong_and_can_be_removed";
    let Some(base) = common::role("named") else {
        let dir = tempfile::tempdir().unwrap();
        return named(TEST, &dir.path().join("base"));
    };
    for (name, damage, _) in DAMAGES {
        published(&base.join(name));
        damage(&base.join(name));
    }
    published(&base.join("whole"));
    fs::create_dir(base.join("begun")).unwrap();
    fs::write(base.join("begun").join(unfinished()), vec![1; MIB]).unwrap();
    let found = Publication::all().unwrap();
    assert_eq!(found.len(), DAMAGES.len() + 2, "{:?}", names(&found));
    for found in &found {
        let name = found.name.as_deref().unwrap();
        let expected = DAMAGES.iter().find(|damage| damage.0 == name).map(|damage| damage.2);
        let told = found.damage.as_deref().unwrap_or_default();
        match expected {
            Some(expected) => assert!(told.contains(expected), "{name}: {told}"),
            None if name == "whole" => assert_eq!((told, found.tensors), ("", 3)),
            None => assert!(told.contains("no control page") && found.unfinished >= MIB as u64, "{told}"),
        }
        assert!(!found.publishing && found.allocated > 10_000, "{name}: {found:?}");
        if name == "page-dir" {
            // That no publisher ever makes.
            assert!(found.remove().is_err());
            fs::remove_dir(base.join(name).join("control")).unwrap();
        }
        found.remove().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!base.join(name).exists(), "{name}: {:?}", listing(&base.join(name)));
    }
    assert_eq!(fs::read(base.with_file_name("outside")).unwrap(), b"mine");
    assert!(Publication::all().unwrap().is_empty());
}

#[test]
fn what_has_a_name_and_is_no_publishers_is_not_removed() {
    const TEST: &str = "what_has_a_name_and_is_no_publishers_is_not_removed";
    let Some(base) = common::role("named") else {
        let dir = tempfile::tempdir().unwrap();
        return named(TEST, &dir.path().join("base"));
    };
    let make = |name: &str| {
        fs::create_dir_all(base.join(name)).unwrap();
        base.join(name)
    };
    // A model of the user's, with and without a file that is called as the page is.
    for name in ["model", "linked"] {
        let state = [("a", bytes_tensor(b"mine"))];
        maptensors::save(state, make(name).join("1.safetensors")).unwrap();
    }
    fs::write(base.join("precious"), b"a file of my own, longer than a magic number").unwrap();
    fs::hard_link(base.join("precious"), base.join("linked/control")).unwrap();
    fs::create_dir(make("directory").join("3.safetensors")).unwrap();
    for name in ["model", "linked", "directory"] {
        let before = listing(&base.join(name));
        let error = Publication::at(name).unwrap().remove().unwrap_err();
        assert!(error.to_string().contains("remove what is yours yourself"), "{name}: {error}");
        assert_eq!(listing(&base.join(name)), before, "{name}");
    }
    assert_eq!(fs::read(base.join("precious")).unwrap(), b"a file of my own, longer than a magic number");
}

#[test]
fn what_lies_at_a_path_is_removed_only_if_it_is_a_publication() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("mine");
    fs::create_dir(&place).unwrap();
    fs::write(place.join("1.safetensors"), b"mine").unwrap();
    let error = Publication::at(&place).unwrap_err();
    assert!(error.to_string().contains("1.safetensors"), "{error}");
    fs::write(place.join("control"), b"a file of my own, longer than a magic number").unwrap();
    let found = Publication::at(&place).unwrap();
    assert!(found.damage.is_some() && found.name.is_none());
    let error = found.remove().unwrap_err();
    assert!(matches!(&error, Error::Publication { .. }), "{error}");
    assert_eq!(listing(&place), ["1.safetensors", "control"]);
    // A damaged one that is one is removed, and what is not the publication's stays.
    let place = dir.path().join("p");
    published(&place);
    fs::write(place.join("notes"), b"mine").unwrap();
    fs::remove_file(segments(&place).pop().unwrap()).unwrap();
    Publication::at(&place).unwrap().remove().unwrap();
    assert_eq!(listing(&place), ["notes"]);
}

/// Attaches and waits, if need be for ever.
fn waited(place: &Path, most: Duration) -> Result<Subscriber, Error> {
    let place = place.to_owned();
    // SAFETY: only publishers write to a test's publication, and it stays as it was damaged.
    common::without_blocking("attaching", move || unsafe { AttachOptions::new().wait(most).attach(place) })
}

#[test]
fn who_waits_for_ever_is_told_of_damage_and_goes_on_waiting_for_what_may_come() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for (name, damage, told) in DAMAGES.iter().filter(|damage| damage.0 != "removing") {
            let place = dir.path().join("base").join(name);
            scope.spawn(move || {
                published(&place);
                damage(&place);
                let error = waited(&place, Duration::MAX).unwrap_err().to_string();
                assert!(error.contains(told), "{name}: {error}");
            });
        }
    });
    // What a publisher is about to make, or to take the place of.
    let comes: [(&str, Make); 4] = [
        ("nowhere", |_| {}),
        ("empty", |place| fs::create_dir(place).unwrap()),
        ("begun", |place| common::begun(place)),
        ("removing", |place| {
            published(place);
            overwrite(place, 32, &[1]);
        }),
    ];
    std::thread::scope(|scope| {
        for (name, make) in comes {
            let place = dir.path().join(name);
            scope.spawn(move || {
                make(&place);
                let error = waited(&place, Duration::from_millis(20)).unwrap_err();
                assert!(matches!(error, Error::Publication { .. }), "{name}: {error}");
                std::thread::scope(|scope| {
                    let waiting = scope.spawn(|| waited(&place, Duration::MAX));
                    // Longer than damage is looked at.
                    std::thread::sleep(Duration::from_millis(1500));
                    let mut publisher = Publisher::open(&place).unwrap();
                    publisher.publish([("a", bytes_tensor(&[1; 100]))]).unwrap();
                    let held = waiting.join().unwrap().unwrap_or_else(|error| panic!("{name}: {error}"));
                    assert!(held.model().contains("a"));
                });
            });
        }
    });
}

#[test]
fn what_does_not_fit_says_what_it_takes_and_what_to_do() {
    const TEST: &str = "what_does_not_fit_says_what_it_takes_and_what_to_do";
    let Some(memory) = common::mount::Mount::memory(TEST, 4 << 20) else { return };
    let place = memory.path().join("p");
    let mut publisher = Publisher::open(&place).unwrap();
    publisher.publish([("a", bytes_tensor(&vec![1; MIB]))]).unwrap();
    let error = publisher.publish([("a", bytes_tensor(&vec![2; 16 * MIB]))]).unwrap_err();
    let Error::Io { path, action, source, .. } = &error else { panic!("{error:?}") };
    assert_eq!(source.raw_os_error(), Some(libc::ENOSPC));
    assert!(path.starts_with(&place), "{}", path.display());
    let needed = format!("room for {} bytes", 16 * MIB);
    for word in [&needed[..], "bytes are free", "maptensors publications", "--remove", "--shm-size"] {
        assert!(action.contains(word), "no {word}: {action}");
    }
    // Nothing is left of it, and what was published stays.
    let found = Publication::at(&place).unwrap();
    assert_eq!((found.generation, found.unfinished, found.spare), (1, 0, 0));
    assert_eq!(publisher.publish([("a", bytes_tensor(&vec![2; MIB]))]).unwrap(), 2);
    // What stands in the way of a second one is removed.
    drop(publisher);
    assert!(found.remove().unwrap() >= MIB as u64);
    Publisher::open(&place).unwrap().publish([("a", bytes_tensor(&vec![1; 3 * MIB]))]).unwrap();
}
