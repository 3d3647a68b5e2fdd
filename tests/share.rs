//! Live weights between processes: what a subscriber holds is one whole generation, and stays so.
#![allow(unsafe_code)]

use maptensors::{AttachOptions, Error, Model, ModelMut, PublishOptions, Publisher, SaveOptions, Subscriber};
use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

mod common;
use common::{bytes_tensor, listing};

fn attach(place: &Path) -> Subscriber {
    // SAFETY: only publishers write to a test's publication.
    unsafe { Subscriber::attach(place) }.unwrap()
}

fn bytes<'a>(model: &'a Model, name: &str) -> &'a [u8] {
    model.tensor(name).unwrap().as_bytes()
}

#[test]
fn a_generation_has_what_was_published_and_shares_what_was_not() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let mut publisher = Publisher::open(&place).unwrap();
    let (a, b) = (vec![1; 10_000], vec![2; 20_000]);
    publisher.set_metadata(BTreeMap::from([("step".to_owned(), "10".to_owned())]));
    assert_eq!(publisher.publish([("a", bytes_tensor(&a)), ("b", bytes_tensor(&b))]).unwrap(), 1);
    let mut reader = attach(&place);
    assert_eq!((reader.generation(), reader.model().len()), (1, 2));
    assert_eq!(reader.model().metadata().iter().collect::<Vec<_>>(), [("step", &"10".into())]);
    let first = reader.model().clone();

    let c = vec![3; 10_000];
    assert!(!reader.has_changed().unwrap());
    assert_eq!(reader.refresh().unwrap(), None);
    assert_eq!(publisher.publish_changed([("a", bytes_tensor(&c)), ("c", bytes_tensor(&c))]).unwrap(), 2);
    assert!(reader.has_changed().unwrap() && reader.latest().unwrap() == 2 && reader.generation() == 1);
    let refreshed = reader.refresh().unwrap().unwrap();
    assert_eq!(
        (refreshed.generation, refreshed.changed, refreshed.removed),
        (2, vec!["a".into(), "c".into()], vec![])
    );
    assert_eq!(
        (bytes(reader.model(), "a"), bytes(reader.model(), "b"), bytes(reader.model(), "c")),
        (&c[..], &b[..], &c[..])
    );
    assert_eq!(bytes(reader.model(), "b").as_ptr(), bytes(&first, "b").as_ptr(), "the same memory");
    assert_eq!(bytes(&first, "a"), a);

    // What differs is copied, what is not given is gone.
    publisher.publish_differing([("a", bytes_tensor(&c)), ("b", bytes_tensor(&a[..500]))]).unwrap();
    let refreshed = reader.refresh().unwrap().unwrap();
    assert_eq!((refreshed.changed, refreshed.removed), (vec!["b".to_owned()], vec!["c".to_owned()]));
    assert_eq!((bytes(reader.model(), "a"), bytes(reader.model(), "b")), (&c[..], &a[..500]));
    assert!(reader.model().get("c").unwrap().is_none());
    publisher.publish_changed([("c", bytes_tensor(&a))]).unwrap();
    assert_eq!(reader.refresh().unwrap().unwrap().changed, ["c"]);

    // What is published again as it was does not differ, whoever says that it changed.
    let all = [("a", bytes_tensor(&c)), ("b", bytes_tensor(&a[..500])), ("c", bytes_tensor(&a))];
    publisher.publish(all).unwrap();
    let refreshed = reader.refresh().unwrap().unwrap();
    assert_eq!((refreshed.generation, refreshed.changed, refreshed.removed), (5, vec![], vec![]));
    publisher.publish_changed([("b", bytes_tensor(&a[..500])), ("a", bytes_tensor(&a))]).unwrap();
    assert_eq!(reader.refresh().unwrap().unwrap().changed, ["a"]);
    assert_eq!(bytes(reader.model(), "c"), a);

    publisher.remove().unwrap();
    assert!(!place.exists());
    for error in [reader.latest().unwrap_err(), reader.wait(None).unwrap_err(), reader.refresh().unwrap_err()]
    {
        assert!(
            matches!(&error, Error::Publication { .. }) && error.to_string().contains("is over"),
            "{error}"
        );
    }
    assert_eq!(bytes(reader.model(), "c"), a, "what is held stays");
}

#[test]
fn files_are_this_users_unless_asked_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
    for (asked, file, directory) in
        [(None, 0o600, 0o700), (Some(0o640), 0o640, 0o750), (Some(0o4777), 0o666, 0o755)]
    {
        let place = dir.path().join(format!("{file:o}"));
        let options = asked.map_or(PublishOptions::new(), |mode| PublishOptions::new().mode(mode));
        let mut publisher = options.open(&place).unwrap();
        for value in 0..4 {
            publisher.publish([("a", bytes_tensor(&[value; 5000]))]).unwrap(); // new, and used again
        }
        assert_eq!(mode(&place), directory);
        for name in listing(&place) {
            assert_eq!(mode(&place.join(&name)), file, "{name}");
        }
        publisher.remove().unwrap();
    }
    let place = dir.path().join("there");
    std::fs::create_dir(&place).unwrap();
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o711)).unwrap();
    Publisher::open(&place).unwrap();
    assert_eq!(mode(&place), 0o711, "somebody else's choice");
}

/// Bytes that a state's file would take, and those on disk of the files that `place` has and had not.
fn allocated(place: &Path, before: &[String]) -> u64 {
    let new = listing(place).into_iter().filter(|name| !before.contains(name));
    new.map(|name| std::fs::metadata(place.join(name)).unwrap().blocks() * 512).sum()
}

type Publish = fn(&mut Publisher, &'static [(String, Vec<u8>)]) -> u64;

#[test]
fn a_hundredth_that_changed_costs_a_hundredth_and_the_rest_is_the_same_pages() {
    const TENSORS: usize = 200;
    const LEN: usize = 256 << 10;
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let state: Vec<(String, Vec<u8>)> =
        (0..TENSORS).map(|i| (format!("layer.{i}"), common::noise(i as u64, LEN))).collect();
    let mut changed = state.clone();
    changed[17].1[5] ^= 1;
    changed[100].1[LEN - 1] ^= 1;
    let view =
        |state: &'static [(String, Vec<u8>)]| state.iter().map(|(name, data)| (name, bytes_tensor(data)));
    let (state, changed): (&'static [_], &'static [_]) = (state.leak(), changed.leak());
    let told: Publish = |publisher, state| {
        let some = [17, 100].map(|i| (&state[i].0, bytes_tensor(&state[i].1)));
        publisher.publish_changed(some).unwrap()
    };
    let found: Publish = |publisher, state| {
        publisher.publish_differing(state.iter().map(|(name, data)| (name, bytes_tensor(data)))).unwrap()
    };
    for publish in [told, found] {
        let mut publisher = Publisher::open(&place).unwrap();
        publisher.publish(view(state)).unwrap();
        let full = allocated(&place, &[]);
        let mut reader = attach(&place);
        let first = reader.model().clone();
        let before = listing(&place);
        publish(&mut publisher, changed);
        let part = allocated(&place, &before);
        assert!(part > 0 && part <= full / 20, "{part} of {full} bytes");
        let refreshed = reader.refresh().unwrap().unwrap();
        assert_eq!(refreshed.changed, ["layer.17", "layer.100"]);
        for (i, (name, data)) in changed.iter().enumerate() {
            let (now, then) = (bytes(reader.model(), name), bytes(&first, name));
            assert!(now == data, "{name}");
            assert_eq!(now.as_ptr() == then.as_ptr(), ![17, 100].contains(&i), "{name}");
        }
        // Another, who attaches only now, maps the same files.
        let other = attach(&place);
        let paths = |model: &Model| {
            (0..model.shards()).map(|s| model.path(s).unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(paths(other.model()), paths(reader.model()));
        publisher.remove().unwrap();
    }
}

#[test]
fn a_model_is_published_with_what_was_written_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let mut publisher = Publisher::open(&place).unwrap();
    // SAFETY: nobody writes to the file while it is mapped.
    let mut model = unsafe { ModelMut::open("models/digits.safetensors") }.unwrap();
    publisher.publish_model(&model).unwrap();
    let mut reader = attach(&place);
    assert_eq!(reader.model().metadata(), model.metadata());
    let check = |reader: &Subscriber, model: &ModelMut| {
        assert!(model.tensors().all(|t| bytes(reader.model(), t.name()) == t.as_bytes()));
        assert_eq!(reader.model().len(), model.len());
    };
    let original = model.tensor("fc1.bias").unwrap().as_bytes().to_vec();
    for (round, expected) in [(0, &["fc1.bias"][..]), (1, &[]), (2, &["fc1.bias"]), (3, &[])] {
        match round {
            0 => model.tensor_mut("fc1.bias").unwrap().as_mut_slice::<f32>().unwrap()[0] += 1.0,
            // Marked: what it compares with itself is another matter.
            1 => model.mark().unwrap(),
            // Back to what the file has, which `changed()` knows as no change.
            2 => model.tensor_mut("fc1.bias").unwrap().as_bytes_mut().copy_from_slice(&original),
            // Published by other means in between: nothing may be taken for granted. Both are as they were held.
            _ => {
                publisher.publish_changed([("fc2.bias", bytes_tensor(&[1; 40]))]).unwrap();
                publisher.publish_changed([("fc1.bias", bytes_tensor(&[1; 256]))]).unwrap();
            }
        }
        publisher.publish_model(&model).unwrap();
        let mut changed = reader.refresh().unwrap().unwrap().changed;
        changed.sort();
        assert_eq!(changed, expected, "round {round}");
        check(&reader, &model);
    }
    // Another model altogether.
    let other = ModelMut::read("models/digits-sharded").unwrap();
    publisher.publish_model(&other).unwrap();
    reader.refresh().unwrap().unwrap();
    check(&reader, &other);
}

#[test]
fn what_is_held_never_changes_and_what_is_edited_is_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let mut publisher = Publisher::open(&place).unwrap();
    let data = |generation: usize, name: usize| common::noise((generation * 10 + name) as u64, 100_000);
    let publish = |publisher: &mut Publisher, generation: usize| {
        let data: Vec<_> = (0..3).map(|name| (name.to_string(), data(generation, name))).collect();
        if generation.is_multiple_of(3) {
            publisher.publish(data.iter().map(|(name, data)| (name, bytes_tensor(data)))).unwrap();
        } else {
            publisher
                .publish_changed(data[..1].iter().map(|(name, data)| (name, bytes_tensor(data))))
                .unwrap();
        }
    };
    publish(&mut publisher, 0);
    let reader = attach(&place);
    let held: Vec<_> = (0..3).map(|name| data(0, name)).collect();
    let mut mine = reader.model_mut().unwrap();
    mine.tensor_mut("1").unwrap().as_bytes_mut().fill(7);
    for generation in 1..=100 {
        publish(&mut publisher, generation);
        for (name, held) in held.iter().enumerate() {
            assert!(bytes(reader.model(), &name.to_string()) == held, "{name} in generation {generation}");
        }
    }
    assert!(bytes(&mine, "1").iter().all(|&byte| byte == 7) && bytes(&mine, "0") == held[0]);
    assert!(bytes(attach(&place).model(), "1") == data(99, 1));
    drop((reader, mine));
    assert!(listing(&place).len() <= 5, "{:?}", listing(&place));
}

#[test]
fn thousands_of_generations_are_never_torn_and_leave_few_bytes() {
    const TENSORS: usize = 40;
    const LEN: usize = 128 << 10;
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let mut publisher = Publisher::open(&place).unwrap();
    let fill = |values: &[u8; TENSORS]| values.map(|value| vec![value; LEN]);
    let mut values = [0u8; TENSORS];
    let metadata = |values: &[u8; TENSORS]| BTreeMap::from([("values".to_owned(), format!("{values:?}"))]);
    publisher.set_metadata(metadata(&values));
    let names: Vec<String> = (0..TENSORS).map(|i| format!("t{i}")).collect();
    publisher
        .publish(names.iter().zip(&fill(&values)).map(|(name, data)| (name, bytes_tensor(data))))
        .unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut reader = attach(&place);
                    let mut seen = 0;
                    let values = |model: &Model| -> Vec<u8> {
                        serde_json::from_str(model.metadata().text("values").unwrap()).unwrap()
                    };
                    let mut before = values(reader.model());
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        let mut changed = Vec::new();
                        if reader.wait(Some(std::time::Duration::from_millis(10))).unwrap() {
                            changed = reader.refresh().unwrap().unwrap().changed;
                        }
                        let now = values(reader.model());
                        for (i, name) in names.iter().enumerate() {
                            let tensor = bytes(reader.model(), name);
                            assert!(
                                tensor.len() == LEN && tensor.iter().all(|&byte| byte == now[i]),
                                "torn: {name}"
                            );
                            // Carried or not.
                            assert_eq!(changed.contains(name), before[i] != now[i], "{name}");
                        }
                        before = now;
                        seen += 1;
                    }
                    seen
                })
            })
            .collect();
        let mut most = (0, 0);
        for generation in 0..1500u64 {
            let noise = common::noise(generation, 5);
            let some: Vec<usize> = noise.iter().map(|&byte| usize::from(byte) % TENSORS).collect();
            let unique: std::collections::BTreeSet<usize> = some.iter().copied().collect();
            for &i in &unique {
                values[i] = values[i].wrapping_add(1);
            }
            publisher.set_metadata(metadata(&values));
            let data = fill(&values);
            publisher.publish_changed(unique.iter().map(|&i| (&names[i], bytes_tensor(&data[i])))).unwrap();
            let files = listing(&place);
            let total: u64 = files
                .iter()
                .filter_map(|name| std::fs::metadata(place.join(name)).ok())
                .map(|m| m.len())
                .sum();
            most = (most.0.max(files.len()), most.1.max(total));
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        println!(
            "at most {} files, {} KiB, of {} KiB that live",
            most.0,
            most.1 >> 10,
            (TENSORS * LEN) >> 10
        );
        assert!(most.0 <= 68, "64 segments, what carries, the control page, a spare, one being written");
        // Up to 12 MiB may be dead in any case; the headers are small.
        assert!(most.1 <= (TENSORS * LEN * 5 / 2 + (13 << 20)) as u64);
        readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<u32>>()
    });
    println!("verified {seen:?} times");
    assert!(seen.iter().all(|&seen| seen > 100), "{seen:?}");
}

#[test]
fn there_is_one_publisher_at_a_time_and_the_next_goes_on_counting() {
    const TEST: &str = "there_is_one_publisher_at_a_time_and_the_next_goes_on_counting";
    if let Some(dir) = common::role("publisher") {
        let mut publisher = Publisher::open(dir.join("p")).unwrap();
        publisher.publish([("a", bytes_tensor(&[1; 100]))]).unwrap();
        std::fs::write(dir.join("ready"), b"").unwrap();
        loop {
            std::thread::park();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let child = common::child(TEST, "publisher", dir.path()).spawn().unwrap();
    let mut child = common::Process(child);
    while !dir.path().join("ready").exists() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let error = Publisher::open(&place).unwrap_err();
    assert!(matches!(error, Error::Busy { .. }) && error.kind().name() == "Busy");
    assert!(error.to_string().contains(&format!("process {} publishes there", child.id())), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
    let mut publisher = Publisher::open(&place).unwrap();
    assert_eq!(publisher.generation(), 1);
    assert_eq!(publisher.publish_changed([("b", bytes_tensor(&[2; 100]))]).unwrap(), 2);
    assert_eq!(attach(&place).model().len(), 2);
    let error = Publisher::open(&place).unwrap_err().to_string();
    assert!(error.contains("this process publishes there already"), "{error}");
    drop(publisher);
    assert_eq!(Publisher::open(&place).unwrap().generation(), 2);
}

#[test]
fn attaching_says_what_is_not_there_yet() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let refused = |text: &str| {
        // SAFETY: nobody writes there.
        let error = unsafe { Subscriber::attach(&place) }.unwrap_err();
        assert!(matches!(error, Error::Publication { .. }) && error.to_string().contains(text), "{error}");
    };
    refused("nothing is published there");
    std::fs::create_dir(&place).unwrap();
    refused("nothing is published there");
    let mut publisher = Publisher::open(&place).unwrap();
    refused("no generation yet");
    let attached = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let options = AttachOptions::new().wait(std::time::Duration::from_secs(600));
            // SAFETY: only publishers write there.
            unsafe { options.attach(&place) }.unwrap()
        });
        publisher.publish([("a", bytes_tensor(&[1; 100]))]).unwrap();
        waiting.join().unwrap()
    });
    assert_eq!(attached.generation(), 1);
    assert!(!attached.wait(Some(std::time::Duration::from_millis(1))).unwrap());
    // Begun anew in the same directory: that is another publication.
    for name in listing(&place) {
        std::fs::remove_file(place.join(name)).unwrap();
    }
    drop(publisher);
    let mut publisher = Publisher::open(&place).unwrap();
    publisher.publish([("a", bytes_tensor(&[2; 100]))]).unwrap();
    publisher.publish([("a", bytes_tensor(&[3; 100]))]).unwrap();
    let waited = attached.wait(Some(std::time::Duration::from_secs(60)));
    assert!(waited.unwrap_err().to_string().contains("is over"));
    assert_eq!(bytes(attached.model(), "a"), [1; 100]);
}

#[test]
fn a_directory_with_files_of_ones_own_is_no_publication() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("7.safetensors"), b"mine").unwrap();
    let error = Publisher::open(dir.path().join(".")).unwrap_err();
    assert!(error.to_string().contains("7.safetensors"), "{error}");
    assert_eq!(listing(dir.path()), ["7.safetensors"]);
    std::fs::rename(dir.path().join("7.safetensors"), dir.path().join("mine.safetensors")).unwrap();
    let mut publisher = Publisher::open(dir.path()).unwrap();
    publisher.publish([("a", bytes_tensor(&[1; 100]))]).unwrap();
    publisher.remove().unwrap();
    assert_eq!(listing(dir.path()), ["mine.safetensors"], "what is not the publication's stays");
}

#[test]
fn a_name_stays_in_its_directory_and_the_default_one_is_private() {
    const TEST: &str = "a_name_stays_in_its_directory_and_the_default_one_is_private";
    if let Some(dir) = common::role("named") {
        for name in ["..", ".", ".x", "", "a\0b", "a\nb", &"n".repeat(201)] {
            let error = Publisher::open(name).unwrap_err();
            assert!(matches!(error, Error::Argument(_)), "{name:?}: {error}");
            // SAFETY: nothing is there.
            let error = unsafe { Subscriber::attach(name) }.unwrap_err();
            assert!(matches!(error, Error::Argument(_)), "{name:?}: {error}");
        }
        let long = "n".repeat(200);
        for name in ["weights", "Gewichte für alle", &long] {
            let mut publisher = Publisher::open(name).unwrap();
            publisher.publish([("a", bytes_tensor(&[1; 100]))]).unwrap();
            assert_eq!(attach(Path::new(name)).path(), publisher.path());
            assert_eq!(publisher.path(), dir.join("base").join(name));
        }
        let mode = std::fs::metadata(dir.join("base")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o700);
        return;
    }
    if let Some(dir) = common::role("relative") {
        assert!(matches!(Publisher::open("x"), Err(Error::Argument(text)) if text.contains("absolute")));
        // A path has a separator, whatever the base is.
        std::env::set_current_dir(&dir).unwrap();
        let publisher = Publisher::open("sub/p").unwrap();
        std::env::set_current_dir("/").unwrap();
        assert_eq!(publisher.path(), dir.join("sub/p"));
        publisher.remove().unwrap();
        return;
    }
    if common::role("default").is_some() {
        let name = format!("test-{}", std::process::id());
        let publisher = Publisher::open(&name).unwrap();
        let base = publisher.path().parent().unwrap().to_owned();
        let expected = format!("maptensors-{}", rustix::process::geteuid().as_raw());
        assert_eq!(base.file_name().unwrap(), &*expected);
        assert_eq!(std::fs::metadata(&base).unwrap().mode() & 0o7777, 0o700);
        if Path::new("/dev/shm").is_dir() {
            assert_eq!(base.parent().unwrap(), Path::new("/dev/shm"));
        }
        publisher.remove().unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    let child = |role: &str, base: Option<&Path>| {
        let mut child = common::child(TEST, role, &path);
        match base {
            Some(base) => child.env("MAPTENSORS_SHARE_DIR", base),
            None => child.env_remove("MAPTENSORS_SHARE_DIR"),
        };
        common::pass(child);
    };
    child("named", Some(&path.join("base")));
    assert_eq!(listing(dir.path()), ["base"]);
    assert_eq!(listing(&path.join("base")).len(), 3);
    child("relative", Some(Path::new("base")));
    child("default", None);
}

#[test]
#[allow(clippy::too_many_lines)] // one table after the other
fn what_makes_no_sense_is_an_error_and_never_a_hang() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("p");
    let fresh = || {
        std::fs::remove_dir_all(&place).ok();
        let mut publisher = Publisher::open(&place).unwrap();
        for value in 0..3 {
            publisher.publish_changed([(format!("t{value}"), bytes_tensor(&[value; 5000]))]).unwrap();
        }
        drop(publisher);
        let mut numbers: Vec<u64> = listing(&place)
            .iter()
            .filter_map(|name| name.strip_suffix(".safetensors")?.parse().ok())
            .collect();
        numbers.sort_unstable();
        assert_eq!(numbers.len(), 3);
        numbers
    };
    let try_all = |what: &str| {
        let path = place.clone();
        let found = common::without_blocking(what, move || {
            // SAFETY: the test is done writing.
            let attached = unsafe { Subscriber::attach(&path) }.map(drop);
            (attached, Publisher::open(&path).map(drop))
        });
        for error in [found.0.unwrap_err(), found.1.unwrap_err()] {
            assert!(
                matches!(
                    error.kind().name(),
                    "Publication" | "Io" | "Json" | "Truncated" | "Limit" | "NotRegular" | "Utf8"
                ),
                "{what}: {} {error}",
                error.kind().name()
            );
        }
    };
    let control = place.join("control");
    for seed in 0..40 {
        fresh();
        let mut page = std::fs::read(&control).unwrap();
        let noise = common::noise(seed, 48);
        match seed % 4 {
            0 => page[..48].copy_from_slice(&noise),
            1 => page[8..32].copy_from_slice(&noise[..24]),
            2 => page[16..24].copy_from_slice(&noise[..8]),
            _ => page.truncate(usize::from(noise[0]) % 48),
        }
        std::fs::write(&control, page).unwrap();
        try_all(&format!("control {seed}"));
    }
    for (what, make) in [
        ("a directory", (|path| std::fs::create_dir(path).unwrap()) as fn(&Path)),
        ("a FIFO", common::fifo),
        ("a link", |path| std::os::unix::fs::symlink("/dev/zero", path).unwrap()),
        ("a dangling link", |path| std::os::unix::fs::symlink("nowhere", path).unwrap()),
        ("an empty file", |path| std::fs::write(path, b"").unwrap()),
    ] {
        for which in 0..4 {
            let numbers = fresh();
            let victim =
                numbers.get(which).map_or(control.clone(), |n| place.join(format!("{n}.safetensors")));
            std::fs::remove_file(&victim).unwrap();
            make(&victim);
            try_all(&format!("{what} for {}", victim.display()));
        }
    }
    for which in 0..3 {
        let numbers = fresh();
        std::fs::remove_file(place.join(format!("{}.safetensors", numbers[which]))).unwrap();
        try_all("a segment that is missing");
    }
    for seed in 0..40u64 {
        let numbers = fresh();
        let head = place.join(format!("{}.safetensors", numbers[2]));
        let (older, number) = (numbers[0], numbers[2]);
        let note = match seed {
            0 => "{}".to_owned(),
            1 => format!(r#"{{"number":{number},"generation":3}}"#),
            2 => format!(r#"{{"number":{number},"generation":4,"head":{{"segments":[{older}]}}}}"#),
            3 => format!(r#"{{"number":{number},"generation":3,"head":{{"segments":[{number}]}}}}"#),
            4 => format!(r#"{{"number":{number},"generation":3,"head":{{"segments":[{older},{older}]}}}}"#),
            5 => format!(r#"{{"number":{number},"generation":3,"head":{{"segments":[0]}}}}"#),
            6 => format!(r#"{{"number":{number},"generation":3,"head":{{"segments":[1000000,{older}]}}}}"#),
            7 => {
                format!(r#"{{"number":{number},"generation":3,"head":{{"segments":["../../etc/passwd"]}}}}"#)
            }
            8 => format!(
                r#"{{"number":{number},"generation":3,"head":{{"segments":[18446744073709551616]}}}}"#
            ),
            _ => {
                // Bytes of the header, anywhere.
                let mut bytes = std::fs::read(&head).unwrap();
                let noise = common::noise(seed, 3);
                bytes[usize::from(noise[0]) % 40] ^= noise[1] | 1;
                std::fs::write(dir.path().join("x"), bytes).unwrap();
                std::fs::rename(dir.path().join("x"), &head).unwrap();
                let path = place.clone();
                // It may still make sense; it may not hang or panic.
                common::without_blocking("a header", move || {
                    // SAFETY: the test is done writing.
                    let attached = unsafe { Subscriber::attach(&path) };
                    attached.is_ok() == Publisher::open(&path).is_ok()
                });
                continue;
            }
        };
        SaveOptions::new()
            .metadata("maptensors.share", note)
            .save([("a", bytes_tensor(&[1; 10]))], &head)
            .unwrap();
        try_all(&format!("head {seed}"));
    }
}
