//! A publisher killed between any two operations; and a lease that is not asked for.

use super::subscriber::attach_own;
use super::{PublishOptions, Publisher, Subscriber, segment};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::os::disk::{self, Dir, Op, Watch};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const TENSORS: usize = 12;
const LEN: usize = 1 << 20;

/// What is published: a tensor's every byte is its value. The metadata says which, so that a generation can be held
/// against what it was published as.
struct Weights {
    values: Vec<u8>,
}

impl Weights {
    fn new() -> Self {
        Self { values: vec![0; TENSORS] }
    }

    /// Changes some and publishes just those; all of them if there is no generation yet.
    fn publish(&mut self, publisher: &mut Publisher, which: &[usize]) -> Result<u64> {
        for &i in which {
            self.values[i] = self.values[i].wrapping_add(1);
        }
        let text: Vec<String> = self.values.iter().map(u8::to_string).collect();
        publisher.set_metadata(BTreeMap::from([("values".to_owned(), text.join(","))]));
        let all: Vec<usize> = (0..TENSORS).collect();
        let which = if publisher.generation() == 0 { &all[..] } else { which };
        let data: Vec<(String, Vec<u8>)> =
            which.iter().map(|&i| (format!("t{i}"), vec![self.values[i]; LEN])).collect();
        publisher.publish_changed(data.iter().map(|(name, data)| (name.as_str(), (DType::U8, [LEN], data))))
    }

    fn publish_all(&mut self, publisher: &mut Publisher) -> Result<u64> {
        self.publish(publisher, &(0..TENSORS).collect::<Vec<_>>())
    }
}

/// Fails on a mixture.
fn assert_whole(reader: &Subscriber, what: &str) {
    let model = reader.model();
    let values: Vec<u8> =
        model.metadata().text("values").unwrap().split(',').map(|value| value.parse().unwrap()).collect();
    assert_eq!(model.len(), TENSORS, "{what}");
    for (i, value) in values.into_iter().enumerate() {
        let tensor = model.tensor(&format!("t{i}")).unwrap();
        assert!(
            tensor.as_bytes().iter().all(|&byte| byte == value),
            "{what}: t{i} of {}",
            reader.generation()
        );
    }
}

/// Does so many operations, and none after: what is left then is what a kill leaves. (Memory that was mapped is
/// written all the same, of a file that has no name yet.)
struct Killed {
    at: usize,
    done: AtomicUsize,
}

impl Watch for Killed {
    fn before(&self, _: &Op<'_>) -> io::Result<()> {
        if self.done.fetch_add(1, Ordering::Relaxed) < self.at {
            Ok(())
        } else {
            Err(io::ErrorKind::Other.into())
        }
    }
    fn after(&self, _: &Op<'_>, _: bool) {}
}

/// Runs `work` and stops it before its `at`-th operation; whether it got that far.
fn killed(at: usize, work: impl FnOnce()) -> bool {
    let watch = Arc::new(Killed { at, done: AtomicUsize::new(0) });
    disk::watched(Some(watch.clone()), work);
    watch.done.load(Ordering::Relaxed) > at
}

type Work = fn(Publisher, &mut Weights);

const SCENARIOS: &[(&str, usize, Work)] = &[
    ("the first generation", 0, |mut publisher, weights| drop(weights.publish_all(&mut publisher))),
    ("a part", 1, |mut publisher, weights| drop(weights.publish(&mut publisher, &[3]))),
    ("all, in a file used again", 3, |mut publisher, weights| drop(weights.publish_all(&mut publisher))),
    ("a part, and others carried", 20, |mut publisher, weights| {
        for i in 0..TENSORS - 1 {
            if weights.publish(&mut publisher, &[i]).is_err() {
                break;
            }
        }
    }),
    ("the end", 2, |publisher, _| drop(publisher.remove())),
];

/// In memory, where the kernel tells who has a file mapped: below a container's overlay it does not.
fn leasing() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

#[test]
fn whoever_is_killed_at_whatever_operation_leaves_a_whole_generation_and_the_next_puts_it_right() {
    for &(name, generations, work) in SCENARIOS {
        for kills in 0.. {
            let temporary = leasing();
            let place = temporary.path().join("p");
            let mut weights = Weights::new();
            let mut publisher = Publisher::open(&place).unwrap();
            for _ in 0..generations.min(3) {
                weights.publish_all(&mut publisher).unwrap();
            }
            let mut reader = (generations > 0).then(|| attach_own(&place).unwrap());
            // The longest scenario is stopped in its later half, where tensors are carried.
            let at = if generations > 10 { kills + 60 } else { kills };
            let what = format!("{name}, before operation {at}");
            let before = publisher.generation();
            if !killed(at, || work(publisher, &mut weights)) {
                assert!(kills > 3, "{name}: {kills}");
                println!("{name}: {kills} kills");
                break;
            }
            // Who holds one has it still, and goes on to the latest.
            if let Some(reader) = &mut reader {
                assert_whole(reader, &what);
                match reader.refresh() {
                    Ok(Some(refreshed)) => assert!(refreshed.generation > before, "{what}"),
                    Ok(None) => assert_eq!(reader.generation(), before, "{what}"),
                    Err(error) => {
                        assert!(
                            name == "the end" && matches!(error, Error::Publication { .. }),
                            "{what}: {error}"
                        );
                    }
                }
                assert_whole(reader, &what);
            }
            let mut weights = Weights::new();
            let mut next = Publisher::open(&place).unwrap_or_else(|error| panic!("{what}: {error}"));
            let last = next.generation();
            assert!(last >= before || name == "the end", "{what}");
            for round in 1..4 {
                assert_eq!(weights.publish_all(&mut next).unwrap(), last + round, "{what}");
            }
            let reader = attach_own(&place).unwrap();
            assert_whole(&reader, &what);
            let names = Dir::open(&place).unwrap().names().unwrap();
            assert!(names.len() <= 3, "{what}: the control page, a segment, a spare, and not {names:?}");
        }
    }
}

#[test]
fn a_late_opener_finds_another_number_and_looks_again() {
    let temporary = leasing();
    let place = temporary.path().join("p");
    let mut weights = Weights::new();
    let mut publisher = Publisher::open(&place).unwrap();
    weights.publish_all(&mut publisher).unwrap();
    let state = publisher.store.look().unwrap();
    // The segment that the control page names has been written anew, under its old name.
    let other = segment::file_name(state.head + 100);
    let text = std::fs::read(place.join(segment::file_name(state.head))).unwrap();
    let note = format!(r#"\"number\":{}"#, state.head);
    let at = text.windows(note.len()).position(|window| window == note.as_bytes()).unwrap();
    let mut changed = text.clone();
    changed[at + note.len() - 1] = b'9';
    std::fs::write(place.join(&other), &changed).unwrap();
    std::fs::rename(place.join(other), place.join(segment::file_name(state.head))).unwrap();
    let error = attach_own(&place).unwrap_err();
    assert!(
        matches!(&error, Error::Publication { .. }) && error.to_string().contains("it is segment 9"),
        "{error}"
    );
}

/// Publishes all again and again while a reader holds one; the inodes of the heads.
fn inodes(place: &Path, generations: usize) -> Vec<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut publisher = Publisher::open(place).unwrap();
    let mut weights = Weights::new();
    (0..generations)
        .map(|_| {
            weights.publish_all(&mut publisher).unwrap();
            let head = publisher.listed[0].segment.note.number;
            std::fs::metadata(publisher.file(head)).unwrap().ino()
        })
        .collect()
}

#[test]
#[cfg(target_os = "linux")]
fn files_are_used_again_when_nobody_has_them_and_never_when_somebody_has() {
    let temporary = leasing();
    let place = temporary.path().join("p");
    let found = inodes(&place, 8);
    assert!(
        found.windows(3).all(|three| three[0] == three[2] && three[0] != three[1]),
        "two files in turn: {found:?}"
    );
    let reader = attach_own(&place).unwrap();
    let (held, sum) = (reader.generation(), reader.model().tensor("t0").unwrap().as_bytes().to_vec());
    let model = reader.model().clone();
    drop(reader);
    // Only the mapping is left, no descriptor.
    let later = inodes(&place, 8);
    assert_eq!(held, 8);
    assert!(!later.contains(&found[7]), "{found:?}, {later:?}");
    assert!(model.tensor("t0").unwrap().as_bytes() == sum);
}

#[test]
fn a_forks_child_does_not_publish_and_does_not_give_the_lock_away() {
    let temporary = leasing();
    let place = temporary.path().join("p");
    let mut publisher = Publisher::open(&place).unwrap();
    let mut weights = Weights::new();
    weights.publish_all(&mut publisher).unwrap();
    // As the child of a fork has it: the same open file, in a process of another number.
    publisher.owner = crate::os::fork::Owner::nobody();
    assert!(matches!(weights.publish_all(&mut publisher), Err(Error::Argument(_))));
    assert!(matches!(publisher.differing(&[]), Err(Error::Argument(_))));
    let parents = publisher.store.control.try_clone().unwrap();
    drop(publisher);
    assert!(matches!(Publisher::open(&place), Err(Error::Busy { .. })));
    drop(parents);
    let publisher = Publisher::open(&place).unwrap();
    assert_eq!(publisher.generation(), 1);
    publisher.remove().unwrap();
    assert!(!place.exists());
}

#[test]
fn a_head_whose_number_nobody_could_count_on_from_is_an_error() {
    let temporary = leasing();
    let place = temporary.path().join("p");
    for head in [segment::LIMIT, u64::MAX - 1, u64::MAX] {
        for generation in [0, 1, u64::MAX] {
            let publisher = Publisher::open(&place).unwrap();
            publisher.store.control.flip(generation, head).unwrap();
            drop(publisher);
            assert!(
                matches!(Publisher::open(&place), Err(Error::Publication { .. })),
                "{head} of {generation}"
            );
            assert!(matches!(attach_own(&place), Err(Error::Publication { .. })), "{head} of {generation}");
            std::fs::remove_dir_all(&place).unwrap();
        }
    }
}

/// Refuses to remove segments, or anything else.
struct Refuse(AtomicUsize);

impl Watch for Refuse {
    fn before(&self, op: &Op<'_>) -> io::Result<()> {
        match op {
            Op::Remove(_, name) if segment::number_of(name).is_some() => {
                self.0.fetch_add(1, Ordering::Relaxed);
                Err(io::Error::from_raw_os_error(libc::EPERM))
            }
            _ => Ok(()),
        }
    }
    fn after(&self, _: &Op<'_>, _: bool) {}
}

#[test]
fn a_segment_that_cannot_be_removed_is_told_and_goes_when_it_can() {
    let temporary = leasing();
    let place = temporary.path().join("p");
    let mut weights = Weights::new();
    let mut publisher = PublishOptions::new().recycle(false).open(&place).unwrap();
    weights.publish_all(&mut publisher).unwrap();
    let refuse = Arc::new(Refuse(AtomicUsize::new(0)));
    let refusing = |work: &mut dyn FnMut()| disk::watched(Some(refuse.clone()), work);
    refusing(&mut || {
        let error = weights.publish_all(&mut publisher).unwrap_err();
        let Error::NotRemoved { path, left, .. } = &error else { panic!("{error}") };
        assert!(*path == place && left.starts_with(&place), "{error}");
        assert_eq!(publisher.generation(), 2, "it is published");
    });
    assert_whole(&attach_own(&place).unwrap(), "with an old segment beside it");
    let count = || Dir::open(&place).unwrap().names().unwrap().len();
    assert_eq!(count(), 3);
    assert_eq!(weights.publish_all(&mut publisher).unwrap(), 3);
    assert_eq!(count(), 2, "both old ones have gone");
    // What a publisher that ends cannot remove is told by `close`.
    publisher.recycle = true;
    weights.publish_all(&mut publisher).unwrap();
    let mut publisher = Some(publisher);
    refusing(&mut || {
        assert!(matches!(publisher.take().unwrap().close(), Err(Error::Io { .. })));
    });
    assert_eq!(count(), 3);
    drop(Publisher::open(&place).unwrap());
    assert_eq!(count(), 2, "the next one removes it");
    assert_eq!(refuse.0.load(Ordering::Relaxed), 2);
}
