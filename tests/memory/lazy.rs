//! Pages brought, given back, locked and streamed: what the kernel says of it, and that no edit is lost.
#![allow(unsafe_code)]

use crate::common::{self, cold};
use maptensors::{
    DType, Draft, Error, Index, Layout, Model, ModelMut, OpenOptions, Order, RankPlan, Select, Split,
    StreamOptions,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MIB: usize = 1 << 20;

/// Not below the system's `/tmp`, which may be memory: what is evicted there is not freed.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Tensors `t0`, `t1`, … of these sizes, whose every 8 bytes say where they are.
fn made(dir: &Path, sizes: &[usize]) -> PathBuf {
    let path = dir.join("model.safetensors");
    let mut layout = Layout::builder();
    for (i, size) in sizes.iter().enumerate() {
        layout = layout.tensor(format!("t{i}"), DType::U64, &[size / 8]);
    }
    let mut draft = Draft::create(&path, &layout.build().unwrap()).unwrap();
    for i in 0..sizes.len() {
        let mut tensor = draft.tensor_mut(&format!("t{i}")).unwrap();
        for (place, value) in tensor.as_mut_slice::<u64>().unwrap().iter_mut().enumerate() {
            *value = (i as u64) << 40 | place as u64;
        }
    }
    draft.commit().unwrap();
    path
}

/// A file of tensors `t0`, `t1`, … of so many bytes, the data close behind the header, as others write it.
fn packed(sizes: &[usize]) -> Vec<u8> {
    let (mut tensors, mut at) = (Vec::new(), 0);
    for (i, size) in sizes.iter().enumerate() {
        tensors
            .push(format!(r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{at},{}]}}"#, at + size));
        at += size;
    }
    let header = format!("{{{}}}", tensors.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.resize(file.len() + at, 7);
    file
}

fn open(path: &Path) -> Model {
    // SAFETY: a file of the test's own, not written any more.
    unsafe { Model::open(path) }.unwrap()
}

fn open_mut(path: &Path) -> ModelMut {
    // SAFETY: as above.
    unsafe { ModelMut::open(path) }.unwrap()
}

fn is_whole(model: &Model, name: &str) -> bool {
    let i: u64 = name[1..].parse().unwrap();
    let tensor = model.tensor(name).unwrap();
    tensor.as_slice::<u64>().unwrap().iter().enumerate().all(|(place, &v)| v == i << 40 | place as u64)
}

#[test]
fn evicting_frees_whole_pages_of_what_is_named_and_no_others() {
    let dir = scratch();
    let path = made(dir.path(), &[3 * MIB + 4096, 5 * MIB, 3 * MIB]);
    for write in [false, true] {
        let edited = write.then(|| open_mut(&path));
        let read = (!write).then(|| open(&path));
        let model: &Model = edited.as_deref().or(read.as_ref()).unwrap();
        // A huge page across the end that somebody else looks at just then cannot be split, and goes as a whole.
        let exact = common::soon(|| {
            assert!(model.prefetch(..).unwrap().wait().unwrap());
            let whole = model.residency().unwrap();
            if (whole.touched, whole.resident) != (whole.pages, whole.pages) {
                return false;
            }
            let evicted = model.evict("t1").unwrap();
            let t1 = model.residency_of("t1").unwrap();
            let others = ["t0", "t2"].map(|other| model.residency_of(other).unwrap());
            assert_eq!(evicted.kept, 0);
            (evicted.freed, evicted.remaining, t1.touched, t1.resident) == (5 * MIB as u64, 0, 0, 0)
                && others.iter().all(|pages| pages.resident == pages.pages)
        });
        assert!(exact);
        assert!(model.names().all(|name| is_whole(model, name)));
        let all = common::soon(|| {
            model.prefetch(..).unwrap().wait().unwrap();
            let evicted = model.evict(..).unwrap();
            evicted.freed == 11 * MIB as u64 + 4096 && model.residency().unwrap().resident == 0
        });
        assert!(all);
    }
}

#[test]
fn evicting_keeps_every_edit_and_says_so() {
    let dir = scratch();
    let path = made(dir.path(), &[4 * MIB, 4 * MIB]);
    let mut model = open_mut(&path);
    for page in [0, 7, 513, 1023] {
        model.tensor_mut("t0").unwrap().as_mut_slice::<u64>().unwrap()[page * 512 + 3] = 99;
    }
    assert!(model.changed().is_ok()); // touches the base as well
    let evicted = model.evict(..).unwrap();
    assert_eq!((evicted.kept, evicted.remaining), (4 * 4096, 0));
    let pages = model.residency().unwrap();
    assert_eq!((pages.private, pages.touched), (4, 4));
    assert_eq!(model.changed().unwrap().elements(), 4);
    let values = model.tensor("t0").unwrap().as_slice::<u64>().unwrap();
    assert!([0, 7, 513, 1023].iter().all(|page| values[page * 512 + 3] == 99));
    assert_eq!(values.iter().filter(|&&value| value == 99).count(), 5); // and the one that is 99 by its place
}

#[test]
fn what_is_locked_is_not_evicted() {
    let dir = scratch();
    let path = made(dir.path(), &[4 * MIB, 4 * MIB]);
    let model = open_mut(&path);
    if let Err(error) = model.lock("t1") {
        return common::skip("what_is_locked_is_not_evicted", error);
    }
    let pages = model.residency_of("t1").unwrap();
    assert_eq!((pages.locked, pages.private), (pages.pages, 0));
    assert_eq!(model.residency_of("t0").unwrap().locked, 0);
    let refused = model.evict(..).unwrap_err();
    assert!(matches!(&refused, Error::Argument(text) if text.contains("\"t1\"")), "{refused}");
    assert_eq!(model.evict("t0").unwrap().kept, 0);
    model.unlock("t1").unwrap();
    assert_eq!(model.residency().unwrap().locked, 0);
    model.evict(..).unwrap();
}

#[test]
fn a_page_of_two_locked_tensors_is_unlocked_behind_the_second() {
    let dir = scratch();
    let path = made(dir.path(), &[808, 808, 808]);
    let model = open(&path);
    if let Err(error) = model.lock(["t0", "t1"]) {
        return common::skip("a_page_of_two_locked_tensors_is_unlocked_behind_the_second", error);
    }
    model.unlock("t0").unwrap();
    assert_eq!(model.residency().unwrap().locked, 1);
    model.unlock("t1").unwrap();
    assert_eq!(model.residency().unwrap().locked, 0);
}

#[test]
fn a_lock_that_fails_midway_leaves_locked_exactly_what_was() {
    const PAGE: usize = 4096;
    let dir = scratch();
    let path = dir.path().join("model.safetensors");
    // Neighbours share a page; the last one's end is cut off.
    let sizes = [3 * PAGE, 3 * PAGE + 100, 3 * PAGE, 3 * PAGE + 100, 3 * PAGE, 9 * PAGE];
    for before in [vec![], vec!["t1"], vec!["t2"], vec!["t1", "t3"], vec!["t0", "t4"]] {
        std::fs::write(&path, packed(&sizes)).unwrap();
        let model = open(&path);
        // (the first also asks whether anything may be locked here)
        let tried = if before.is_empty() { model.lock("t0") } else { model.lock(&before[..]) };
        if let Err(error) = tried {
            return common::skip("a_lock_that_fails_midway_leaves_locked_exactly_what_was", error);
        }
        if before.is_empty() {
            model.unlock("t0").unwrap();
        }
        let locked = || {
            assert!(model.prefetch(["t0", "t1", "t2", "t3", "t4"]).unwrap().wait().unwrap());
            model
                .residency_by_tensor(..)
                .unwrap()
                .into_iter()
                .map(|(_, pages)| pages.locked)
                .collect::<Vec<_>>()
        };
        let was = locked();
        assert_eq!(was.iter().any(|&pages| pages > 0), !before.is_empty());
        let cut = std::fs::metadata(&path).unwrap().len() - 6 * PAGE as u64;
        // The contract is broken here on purpose; no byte behind the cut is looked at.
        std::fs::File::options().write(true).open(&path).unwrap().set_len(cut).unwrap();
        for names in [&["t0", "t2", "t5"][..], &["t0", "t1", "t2", "t3", "t4", "t5"], &["t3", "t5"]] {
            assert!(matches!(model.lock(names), Err(Error::Io { .. })));
            assert!(common::soon(|| locked() == was), "{before:?}, {names:?}: {:?}, not {was:?}", locked());
        }
        // What was locked before is known to be: it is unlocked by its name, and then nothing is locked.
        if !before.is_empty() {
            model.unlock(&before[..]).unwrap();
        }
        assert_eq!(locked(), [0; 6]);
    }
}

#[test]
fn of_a_model_that_was_opened_locked_neighbours_of_what_is_unlocked_stay_so() {
    let dir = scratch();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, packed(&[50_000, 50_000, 50_000])).unwrap();
    // SAFETY: a file of the test's own, not written any more.
    let model = match unsafe { OpenOptions::new().lock(true).open(&path) } {
        Ok(model) => model,
        Err(error) => {
            return common::skip(
                "of_a_model_that_was_opened_locked_neighbours_of_what_is_unlocked_stay_so",
                error,
            );
        }
    };
    model.unlock("t1").unwrap();
    for name in ["t0", "t2"] {
        let is_locked = common::soon(|| {
            assert!(model.tensor(name).unwrap().as_bytes().iter().all(|&byte| byte == 7));
            let pages = model.residency_of(name).unwrap();
            pages.locked == pages.pages
        });
        assert!(is_locked, "{name}");
    }
    let own = model.residency_of("t1").unwrap();
    assert_eq!(own.locked, 2);
    model.unlock(..).unwrap();
    assert_eq!(model.residency().unwrap().locked, 0);
}

#[test]
fn a_locked_tensor_of_no_bytes_keeps_no_page_of_others_locked() {
    let dir = scratch();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, packed(&[50_000, 0, 50_000])).unwrap();
    let model = open(&path);
    if let Err(error) = model.lock(..) {
        return common::skip("a_locked_tensor_of_no_bytes_keeps_no_page_of_others_locked", error);
    }
    model.unlock(["t0", "t2"]).unwrap();
    assert_eq!(model.residency().unwrap().locked, 0);
    // Nor is it taken for the one that begins where it lies.
    model.lock(..).unwrap();
    model.unlock("t1").unwrap();
    model.unlock("t0").unwrap();
    let t2 = model.residency_of("t2").unwrap();
    assert_eq!(t2.locked, t2.pages);
}

#[test]
fn after_a_prefetch_nothing_is_read_from_the_disk() {
    let dir = scratch();
    let path = made(dir.path(), &[40 * MIB, 24 * MIB]);
    cold(&path);
    let model = open(&path);
    let major = major_faults;
    let prefetch = model.prefetch(..).unwrap();
    let total = prefetch.progress().1;
    assert_eq!(total, 64 * MIB as u64);
    assert!(prefetch.wait_for(Duration::from_secs(60)).unwrap().unwrap());
    assert_eq!(prefetch.progress(), (total, total));
    let before = major();
    assert!(is_whole(&model, "t0") && is_whole(&model, "t1"));
    assert!(major() - before <= 1);
}

fn major_faults() -> i64 {
    // Of this thread, so that other tests do not count.
    let status = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
    status.rsplit(')').next().unwrap().split_whitespace().nth(9).unwrap().parse().unwrap()
}

#[test]
fn a_small_tensor_is_prefetched_without_its_neighbours() {
    let dir = scratch();
    let path = made(dir.path(), &[20 * MIB, 64 << 10, 20 * MIB]);
    cold(&path);
    let model = open(&path);
    let is_there = common::soon(|| {
        model.prefetch("t1").unwrap().wait().unwrap();
        let own = model.residency_of("t1").unwrap();
        own.touched == own.pages
    });
    assert!(is_there);
    let (own, all) = (model.residency_of("t1").unwrap(), model.residency().unwrap());
    // Reading the header brought its own pages, and a few behind.
    assert!(all.resident <= own.pages + 8, "{} pages in memory for {}", all.resident, own.pages);
}

#[test]
fn a_stream_brings_every_tensor_within_its_budget() {
    let dir = scratch();
    let sizes: Vec<usize> = (0..24).map(|i| if i % 5 == 0 { 9 * MIB } else { 300_000 + 8 * i }).collect();
    let path = made(dir.path(), &sizes);
    let budget = 12 * MIB;
    for order in [Order::File, Order::Name, Order::Given(vec!["t7", "t20", "t3", "t0"])] {
        cold(&path);
        let model = open(&path);
        let expected: Vec<String> = match &order {
            Order::Given(names) => names.iter().map(ToString::to_string).collect(),
            order => {
                let mut names: Vec<String> = model.names().map(str::to_owned).collect();
                if *order == Order::Name {
                    names.sort();
                }
                names
            }
        };
        let mut stream =
            model.stream(StreamOptions::new().budget(budget as u64).order(order.clone())).unwrap();
        let mut seen = Vec::new();
        for tensor in stream.by_ref() {
            let name = tensor.unwrap().name().to_owned();
            assert!(is_whole(&model, &name));
            seen.push(name);
            let resident = model.residency().unwrap().resident * 4096;
            // The kernel's read-ahead goes further, in file order; and a page that another processor has just brought is
            // passed over when its neighbours are given back.
            let further = if order == Order::File { 18 * MIB } else { 4 * MIB };
            assert!(resident <= budget + further, "{order:?}: {resident}");
        }
        assert_eq!(seen, expected);
        let (bytes, total) = stream.progress();
        assert_eq!(bytes, total);
        assert!(model.residency().unwrap().touched <= 8 * MIB / 4096);
    }
}

#[test]
fn a_stream_of_a_window_gives_back_the_page_that_it_begins_in() {
    let dir = scratch();
    let path = dir.path().join("archive.tar");
    for offset in [1, 512, 3900, 4097] {
        std::fs::write(&path, [vec![1; offset], packed(&[8 * MIB])].concat()).unwrap();
        cold(&path);
        let options = OpenOptions::new().window(offset as u64..);
        // SAFETY: a file of the test's own, not written while it is mapped.
        let read = unsafe { options.open(&path) }.unwrap();
        // SAFETY: as above.
        let edited = unsafe { options.open_mut(&path) }.unwrap();
        for model in [&read, &*edited] {
            let nothing_stays = common::soon(|| {
                let mut stream =
                    model.stream(StreamOptions::new().budget(2 << 20)).unwrap().map(Result::unwrap);
                assert!(stream.all(|tensor| tensor.as_bytes().iter().all(|&byte| byte == 7)));
                drop(stream);
                model.residency().unwrap().touched == 0
            });
            assert!(nothing_stays, "{offset}");
        }
    }
}

#[test]
fn a_tensor_kept_from_a_stream_stays_valid() {
    let dir = scratch();
    let path = made(dir.path(), &[4 * MIB, 4 * MIB, 4 * MIB]);
    let model = open(&path);
    let stream = model.stream(StreamOptions::new().budget(1)).unwrap();
    let kept: Vec<_> = stream.map(Result::unwrap).collect();
    for (i, tensor) in kept.iter().enumerate() {
        let values = tensor.as_slice::<u64>().unwrap();
        assert!(values.iter().enumerate().all(|(place, &v)| v == (i as u64) << 40 | place as u64));
    }
}

#[test]
fn an_order_or_a_selection_that_cannot_be_is_an_error() {
    let model = Model::read("models/digits.safetensors").unwrap();
    let twice = model.stream(StreamOptions::new().order(Order::Given(vec!["fc1.bias", "fc1.bias"])));
    assert!(matches!(twice, Err(Error::Argument(_))));
    let missing = model.stream(StreamOptions::new().order(Order::Given(vec!["fc1.bais"])));
    assert!(matches!(missing, Err(Error::Missing { .. })));
    assert!(matches!(model.evict(Select::matching(|_| false)), Err(Error::Argument(_))));
    assert!(matches!(model.prefetch("nothing"), Err(Error::Missing { .. })));
    // Memory of one's own: nothing to bring, nothing to give back.
    assert_eq!(model.evict(..).unwrap(), maptensors::Evicted::default());
    assert!(model.prefetch(..).unwrap().wait().unwrap());
    assert_eq!(model.stream(StreamOptions::new()).unwrap().count(), 4);
}

#[test]
fn a_cancelled_prefetch_ends_and_says_so() {
    let dir = scratch();
    let path = made(dir.path(), &[64 * MIB]);
    cold(&path);
    let model = open(&path);
    let prefetch = model.prefetch(..).unwrap();
    prefetch.cancel();
    let all = prefetch.wait_for(Duration::from_secs(60)).unwrap().unwrap();
    let (bytes, total) = prefetch.progress();
    assert_eq!(all, bytes == total);
    assert!(!all, "the machine read 64 MiB faster than one call returned");
    // Dropped, and the model too: what is under way keeps the file mapped itself.
    drop(model.prefetch(..).unwrap());
    drop(model);
}

#[test]
fn a_file_cut_short_is_an_error_with_the_tensor_and_no_signal() {
    let dir = scratch();
    let path = made(dir.path(), &[4 * MIB, 4 * MIB, 64]);
    let model = open(&path);
    // The contract is broken here on purpose; no byte behind the cut is looked at.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(4 * MIB as u64).unwrap();
    let error = model.prefetch("t1").unwrap().wait().unwrap_err().to_string();
    assert!(error.contains("\"t1\"") && error.contains("model.safetensors"), "{error}");
    let mut stream = model.stream(StreamOptions::new()).unwrap();
    assert!(stream.next().unwrap().is_err()); // its last page is gone
    let error = stream.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("\"t1\""), "{error}");
    assert!(stream.next().unwrap().is_err() && stream.next().is_none());
}

#[test]
fn a_stream_and_a_shard_are_guarded_accesses() {
    let dir = scratch();
    let path = made(dir.path(), &[4096, 4 * MIB]);
    // SAFETY: nothing is looked at behind a change.
    let model = unsafe { OpenOptions::new().guard(true).open(&path) }.unwrap();
    let plan = RankPlan::new().otherwise(Split::Replicate);
    let mut stream = model.stream(StreamOptions::new()).unwrap();
    assert!(stream.next().unwrap().is_ok() && model.rank_view(0, 1, &plan).is_ok());
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8], 4 * MIB as u64).unwrap();
    assert!(matches!(stream.next(), Some(Err(Error::Changed { .. }))));
    assert!(matches!(model.rank_view(0, 1, &plan), Err(Error::Changed { .. })));
}

#[test]
fn the_ranks_of_a_plan_are_the_whole_and_touch_their_parts() {
    let dir = scratch();
    let path = dir.path().join("model.safetensors");
    let shapes: [(&str, &[usize]); 4] =
        [("q.weight", &[1024, 1024]), ("o.weight", &[1024, 1024]), ("q.bias", &[1024]), ("norm", &[1000])];
    let layout = shapes.iter().fold(Layout::builder(), |l, (name, shape)| l.tensor(*name, DType::F32, shape));
    let mut draft = Draft::create(&path, &layout.build().unwrap()).unwrap();
    for (name, _) in shapes {
        let mut tensor = draft.tensor_mut(name).unwrap();
        let values = tensor.as_mut_slice::<f32>().unwrap();
        values.iter_mut().zip((0..=u16::MAX).cycle()).for_each(|(value, i)| *value = f32::from(i));
    }
    draft.commit().unwrap();
    let plan = RankPlan::new()
        .when(|name| name.starts_with("q."), Split::COLUMN)
        .when(|name| name == "o.weight", Split::ROW)
        .otherwise(Split::Replicate);
    let mut edited = open_mut(&path);
    edited.tensor_mut("o.weight").unwrap().as_mut_slice::<f32>().unwrap()[2000] = -1.0;
    for model in [&open(&path), &*edited, &Model::read(&path).unwrap()] {
        for rank in 0..4 {
            let part = model.rank_view(rank, 4, &plan).unwrap();
            for (name, shape) in shapes {
                let quarter = |size: usize| Index::from(rank * size / 4..(rank + 1) * size / 4);
                let expected = match name {
                    "o.weight" => vec![Index::from(..), quarter(shape[1])],
                    "norm" => vec![],
                    _ => vec![quarter(shape[0])],
                };
                let expected = model.tensor(name).unwrap().slice(&expected).unwrap();
                let found = part.tensor(name).unwrap();
                assert_eq!(found.shape(), expected.shape(), "{name}");
                assert_eq!(found.to_vec::<f32>().unwrap(), expected.to_vec::<f32>().unwrap(), "{name}");
                assert!(found.is_aligned());
            }
            assert_eq!(part.nbytes(), (2 << 20) + 1024 + 4000);
            assert!(part.touched() <= part.nbytes() * 105 / 100 || model.residency().unwrap().private > 0);
            // The column is a view.
            let (view, whole) = (part.tensor("q.weight").unwrap(), model.tensor("q.weight").unwrap());
            assert_eq!(view.as_bytes().as_ptr(), whole.as_bytes()[rank << 20..].as_ptr());
        }
    }
    assert!(matches!(open(&path).rank_view(4, 4, &plan), Err(Error::Argument(_))));
    let none = open(&path).rank_view(0, 4, &RankPlan::new()).unwrap_err().to_string();
    assert!(none.contains("no rule of the plan matches 4 of the 4"), "{none}");
}
