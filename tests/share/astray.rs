//! Publications that somebody has moved, emptied, linked away or laid over another file system.
#![allow(unsafe_code)]

use maptensors::{Error, PublishOptions, Publisher, Subscriber};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use crate::common::{self, bytes_tensor, listing};

fn attach(place: &Path) -> Subscriber {
    // SAFETY: only publishers write to a test's publication.
    unsafe { Subscriber::attach(place) }.unwrap()
}

fn publish(publisher: &mut Publisher, value: u8) -> maptensors::Result<u64> {
    publisher.publish([("a", bytes_tensor(&vec![value; 100_000]))])
}

fn first(model: &maptensors::Model) -> &[u8] {
    model.tensor("a").unwrap().as_bytes()
}

/// A file system laid over another; gone when dropped.
struct Overlay(tempfile::TempDir);

impl Overlay {
    fn new(test: &str) -> Option<Self> {
        if !common::is_root() {
            common::skip(test, "mounting a file system needs root");
            return None;
        }
        let root = common::disk_dir();
        for name in ["lower", "upper", "work", "mnt"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        let at = |name: &str| root.path().join(name).display().to_string();
        let options = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
        let made =
            Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options, &at("mnt")]).output();
        match made {
            Ok(made) if made.status.success() => Some(Self(root)),
            made => {
                common::skip(test, format!("mounting an overlay: {made:?}"));
                None
            }
        }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(self.0.path().join("mnt")).status().ok();
    }
}

#[test]
fn what_is_held_stays_where_the_kernel_loses_sight_of_mappings() {
    let Some(overlay) = Overlay::new("what_is_held_stays_where_the_kernel_loses_sight_of_mappings") else {
        return;
    };
    let place = overlay.0.path().join("mnt/p");
    let mut publisher = Publisher::open(&place).unwrap();
    publish(&mut publisher, 1).unwrap();
    // The mapping alone: no descriptor is left.
    let held = attach(&place).model().clone();
    for value in 2..6 {
        publish(&mut publisher, value).unwrap();
        assert_eq!(first(&held)[..10], [1; 10], "written under a reader");
    }
}

#[test]
fn a_publisher_whose_publication_was_taken_away_says_so_and_leaves_the_next_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let lost = |publisher: &mut Publisher, what: &str| {
        let error = publish(publisher, 9).unwrap_err();
        assert!(matches!(error, Error::Publication { .. }), "{what}: {error}");
    };
    for what in ["moved", "removed", "emptied"] {
        let mut old = Publisher::open(&place).unwrap();
        publish(&mut old, 1).unwrap();
        publish(&mut old, 2).unwrap(); // there is a spare
        match what {
            "moved" => std::fs::rename(&place, dir.path().join("elsewhere")).unwrap(),
            "removed" => std::fs::remove_dir_all(&place).unwrap(),
            _ => listing(&place).iter().for_each(|name| std::fs::remove_file(place.join(name)).unwrap()),
        }
        lost(&mut old, what);
        let mut new = Publisher::open(&place).unwrap();
        publish(&mut new, 5).unwrap();
        lost(&mut old, what);
        let found = listing(&place);
        if what == "emptied" {
            assert!(matches!(old.remove(), Err(Error::Publication { .. })));
        } else {
            drop(old);
        }
        assert_eq!(listing(&place), found, "{what}");
        assert_eq!(first(attach(&place).model())[..10], [5; 10], "{what}");
        new.remove().unwrap();
    }
    assert_eq!(attach(&dir.path().join("elsewhere")).generation(), 2, "moved, whole");
}

#[test]
fn what_was_published_before_gets_the_mode_that_is_asked_for_now() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    for mode in [0o644, 0o600, 0o640] {
        let mut publisher = PublishOptions::new().mode(mode).open(&place).unwrap();
        publisher.publish_changed([(format!("{mode:o}"), bytes_tensor(&vec![1; 100_000]))]).unwrap();
        drop(publisher);
        for name in listing(&place) {
            assert_eq!(std::fs::metadata(place.join(&name)).unwrap().mode() & 0o7777, mode, "{name}");
        }
    }
    assert_eq!(listing(&place).len(), 4);
}

#[test]
fn a_name_that_is_a_link_or_a_file_is_refused_and_its_mode_let_be() {
    const TEST: &str = "a_name_that_is_a_link_or_a_file_is_refused_and_its_mode_let_be";
    if common::role("named").is_some() {
        for name in ["link", "file"] {
            let error = PublishOptions::new().mode(0o644).open(name).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{name}: {error}");
        }
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("theirs")).unwrap();
    std::os::unix::fs::symlink(at("theirs"), at("link")).unwrap();
    std::fs::write(at("file"), b"mine").unwrap();
    for name in ["theirs", "file"] {
        std::fs::set_permissions(at(name), std::fs::Permissions::from_mode(0o700)).unwrap();
    }
    let mut child = common::child(TEST, "named", dir.path());
    child.env("MAPTENSORS_SHARE_DIR", dir.path());
    common::pass(child);
    for name in ["theirs", "file"] {
        assert_eq!(std::fs::metadata(at(name)).unwrap().mode() & 0o777, 0o700, "{name}");
    }
    assert!(listing(&at("theirs")).is_empty());
}

#[test]
fn a_name_that_is_there_twice_is_refused_whatever_its_bytes_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut publisher = Publisher::open(dir.path().join("p")).unwrap();
    publish(&mut publisher, 1).unwrap();
    for value in [1, 2] {
        let (one, other) = (vec![1; 100_000], vec![value; 100_000]);
        let twice = [("a", bytes_tensor(&one)), ("a", bytes_tensor(&other))];
        assert!(publisher.publish_differing(twice).is_err(), "{value}");
    }
    assert_eq!(publisher.generation(), 1);
}
