//! What publishing leaves of a place: nothing where it fails, and a way in for those who are to have one.

use crate::common::{self, bytes_tensor, listing};
use maptensors::{Error, Publication, PublishOptions, Publisher};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

const NOBODY: u32 = 65_534;

fn publish(publisher: &mut Publisher, value: u8) -> maptensors::Result<u64> {
    publisher.publish([("a", bytes_tensor(&[value; 5000]))])
}

/// What is refused: one name twice.
fn refused(publisher: &mut Publisher) {
    let twice = [("a", bytes_tensor(&[1; 10])), ("a", bytes_tensor(&[1; 10]))];
    assert!(publisher.publish(twice).is_err());
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_first_publication_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("made/for it/p");
    let mut publisher = Publisher::open(&place).unwrap();
    refused(&mut publisher);
    publisher.close().unwrap();
    assert!(listing(dir.path()).is_empty(), "{:?}", listing(dir.path()));
    assert!(matches!(Publication::at(&place), Err(Error::Publication { .. })));
    // One that never came to publish, too.
    drop(Publisher::open(&place).unwrap());
    assert!(listing(dir.path()).is_empty());
    // What was there before stays.
    let mine = dir.path().join("mine");
    fs::create_dir(&mine).unwrap();
    drop(Publisher::open(&mine).unwrap());
    assert!(listing(&mine).is_empty());
    fs::write(mine.join("notes"), b"").unwrap();
    let mut publisher = Publisher::open(&mine).unwrap();
    refused(&mut publisher);
    // A second try is as good as a first.
    assert_eq!(publish(&mut publisher, 1).unwrap(), 1);
    drop(publisher);
    assert_eq!(listing(&mine).len(), 3);
}

#[test]
fn a_publication_that_is_there_stays_as_it_was_when_the_next_one_fails() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    publish(&mut Publisher::open(&place).unwrap(), 1).unwrap();
    let before = listing(&place);
    let mut publisher = Publisher::open(&place).unwrap();
    refused(&mut publisher);
    drop(publisher);
    assert_eq!(listing(&place), before);
    let found = Publication::at(&place).unwrap();
    assert_eq!((found.generation, found.tensors, found.damage), (1, 1, None));
}

#[test]
fn a_first_publication_that_does_not_fit_leaves_nothing() {
    const TEST: &str = "a_first_publication_that_does_not_fit_leaves_nothing";
    let Some(memory) = common::mount::Mount::memory(TEST, 1 << 20) else { return };
    let place = memory.path().join("p");
    let mut publisher = Publisher::open(&place).unwrap();
    let error = publisher.publish([("a", bytes_tensor(&vec![2; 4 << 20]))]).unwrap_err();
    assert!(
        matches!(&error, Error::Io { source, .. } if source.raw_os_error() == Some(libc::ENOSPC)),
        "{error}"
    );
    drop(publisher);
    assert!(listing(&memory.path()).is_empty());
    // Not even the control page fits: nothing but that is asked for, and the directory goes.
    fs::write(memory.path().join("full"), vec![1; 2 << 20]).unwrap_err();
    let error = Publisher::open(&place).unwrap_err();
    assert!(
        matches!(&error, Error::Io { source, .. } if source.raw_os_error() == Some(libc::ENOSPC)),
        "{error}"
    );
    assert_eq!(listing(&memory.path()), ["full"]);
}

#[test]
fn a_directory_that_is_there_is_opened_for_those_who_are_to_read_and_never_closed() {
    let dir = tempfile::tempdir().unwrap();
    for (before, files, after) in [
        (0o700, 0o644, 0o755),
        (0o700, 0o640, 0o750),
        (0o750, 0o600, 0o750),
        (0o1777, 0o644, 0o1777),
        (0o2710, 0o644, 0o2755),
    ] {
        let place = dir.path().join(format!("{before:o} {files:o}"));
        fs::create_dir(&place).unwrap();
        set_mode(&place, before);
        let options = PublishOptions::new().mode(files);
        publish(&mut options.open(&place).unwrap(), 1).unwrap();
        assert_eq!(mode(&place), after, "{before:o} {files:o}");
        assert!(listing(&place).iter().all(|name| mode(&place.join(name)) == files));
        // Also when it goes on.
        set_mode(&place, before);
        publish(&mut options.open(&place).unwrap(), 1).unwrap();
        assert_eq!(mode(&place), after, "{before:o} {files:o}, again");
    }
}

#[test]
fn a_mode_that_only_another_user_can_give_is_an_error_that_says_so() {
    const TEST: &str = "a_mode_that_only_another_user_can_give_is_an_error_that_says_so";
    if let Some(dir) = common::role("other") {
        let error = PublishOptions::new().mode(0o644).open(dir.join("closed")).unwrap_err().to_string();
        assert!(error.contains("is user 0's and has mode 730") && error.contains("mode 775"), "{error}");
        assert!(listing(&dir.join("readable")) == ["control"]);
        let error = PublishOptions::new().mode(0o644).open(dir.join("readable")).unwrap_err().to_string();
        assert!(error.contains("control is user 0's and has mode 666"), "{error}");
        let error = Publisher::open(dir.join("locked")).unwrap_err().to_string();
        assert!(error.contains("control is user 0's and has mode 600") && error.contains("can remove it"));
        let found = Publication::at(dir.join("locked")).unwrap().damage.unwrap();
        assert!(found.contains("control is user 0's"), "{found}");
        return;
    }
    if !common::is_root() {
        return common::skip(TEST, "being two users needs root");
    }
    let dir = tempfile::tempdir().unwrap();
    set_mode(dir.path(), 0o755);
    for (name, directory, page) in
        [("closed", 0o730, None), ("readable", 0o777, Some(0o666)), ("locked", 0o777, Some(0o600))]
    {
        let place = dir.path().join(name);
        fs::create_dir(&place).unwrap();
        if let Some(page) = page {
            common::begun(&place);
            set_mode(&place.join("control"), page);
        }
        set_mode(&place, directory);
    }
    chown(dir.path().join("closed"), Some(0), Some(NOBODY)).unwrap();
    let (child, _home) = common::unprivileged_child(TEST, "other", dir.path());
    common::pass(child);
}

#[test]
fn root_publishes_in_another_users_place_without_locking_that_user_out() {
    const TEST: &str = "root_publishes_in_another_users_place_without_locking_that_user_out";
    if let Some(dir) = common::role("owner") {
        let mut publisher = Publisher::open(dir.join("p")).unwrap();
        let before = publisher.generation();
        assert_eq!(publish(&mut publisher, 5).unwrap(), before + 1);
        return;
    }
    if !common::is_root() {
        return common::skip(TEST, "being two users needs root");
    }
    let dir = tempfile::tempdir().unwrap();
    set_mode(dir.path(), 0o755);
    let place = dir.path().join("p");
    fs::create_dir(&place).unwrap();
    chown(&place, Some(NOBODY), Some(NOBODY)).unwrap();
    for round in 0..2 {
        let mut publisher = Publisher::open(&place).unwrap();
        for value in 0..4 {
            publish(&mut publisher, value).unwrap();
            publisher.publish_changed([("b", bytes_tensor(&[value; 10]))]).unwrap();
        }
        drop(publisher);
        for name in listing(&place) {
            let found = fs::metadata(place.join(&name)).unwrap();
            assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (NOBODY, NOBODY, 0o600), "{name}");
        }
        let (child, _home) = common::unprivileged_child(TEST, "owner", dir.path());
        common::pass(child);
        assert_eq!(Publication::at(&place).unwrap().generation, 9 * (round + 1));
    }
}
