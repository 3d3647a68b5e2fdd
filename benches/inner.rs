//! The crate's inner loops, against the `safetensors` crate on the same bytes.

// Mapping a file is unsafe: nobody may write to it meanwhile. Nobody knows these.
#![allow(unsafe_code, missing_docs)]

use std::fs::File;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use maptensors::{Content, DType, Index, Model, SaveOptions, TensorView};
use memmap2::Mmap;
use safetensors::SafeTensors;

const TENSORS: usize = 20_000;
const SAVED: usize = 64 << 20;

/// A file of small tensors, and the directory that is removed with it.
struct Many {
    dir: tempfile::TempDir,
    path: PathBuf,
    names: Vec<String>,
}

fn many() -> Many {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("many.safetensors");
    let names: Vec<_> = (0..TENSORS).map(|i| format!("model.layers.{i}.bias")).collect();
    let bytes = vec![7; 64 * 4];
    let views = names.iter().map(|name| (name.clone(), view(&[64], &bytes)));
    maptensors::save(views, &path).unwrap();
    Many { dir, path, names }
}

fn view<'a>(shape: &'a [usize], bytes: &'a [u8]) -> TensorView<'a> {
    TensorView::from_bytes(DType::F32, shape, bytes).unwrap()
}

fn open(path: &Path) -> Model {
    // SAFETY: the file is in a directory of its own, and only read from here on.
    unsafe { Model::open(path) }.unwrap()
}

fn map(path: &Path) -> Mmap {
    let file = File::open(path).unwrap();
    // SAFETY: as above.
    unsafe { Mmap::map(&file) }.unwrap()
}

fn opening(c: &mut Criterion) {
    let many = many();
    let mut group = c.benchmark_group("open-20000");
    group.bench_function("maptensors", |b| b.iter(|| open(&many.path).len()));
    group.bench_function("safetensors", |b| {
        b.iter(|| SafeTensors::deserialize(&map(&many.path)).unwrap().len());
    });
    group.finish();

    let mut group = c.benchmark_group("views-20000");
    group.bench_function("maptensors", |b| {
        b.iter(|| {
            let model = open(&many.path);
            model.tensors().map(|tensor| black_box(tensor.as_bytes()).len()).sum::<usize>()
        });
    });
    group.bench_function("safetensors", |b| {
        b.iter(|| {
            let map = map(&many.path);
            let model = SafeTensors::deserialize(&map).unwrap();
            model.iter().map(|(_, tensor)| black_box(tensor.data()).len()).sum::<usize>()
        });
    });
    group.finish();

    // What opening costs beyond parsing, and what a name costs.
    let header = header(&many.path);
    let mut group = c.benchmark_group("header-20000");
    group.bench_function("maptensors", |b| b.iter(|| Model::read(Content::new(&header)).unwrap().len()));
    group.bench_function("safetensors", |b| {
        b.iter(|| SafeTensors::read_metadata(&header).unwrap().0);
    });
    group.finish();

    let model = open(&many.path);
    let mapped = map(&many.path);
    let theirs = SafeTensors::deserialize(&mapped).unwrap();
    let mut group = c.benchmark_group("lookup-20000");
    group.bench_function("maptensors", |b| {
        b.iter(|| {
            many.names.iter().map(|name| model.get(name).unwrap().unwrap().as_bytes().len()).sum::<usize>()
        });
    });
    group.bench_function("safetensors", |b| {
        b.iter(|| many.names.iter().map(|name| theirs.tensor(name).unwrap().data().len()).sum::<usize>());
    });
    group.finish();
    drop(many.dir);
}

/// The same 20,000 names, of tensors without elements: a file that is nothing but its header.
fn header(path: &Path) -> Vec<u8> {
    let model = open(path);
    let empty = model.names().map(|name| (name, view(&[0, 64], &[])));
    safetensors::serialize(empty, None).unwrap()
}

fn slicing(c: &mut Criterion) {
    let bytes = vec![7; 1024 * 1024 * 4];
    let theirs =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1024, 1024], &bytes).unwrap();
    let file = safetensors::serialize([("w", theirs)], None).unwrap();
    let model = Model::read(Content::new(&file)).unwrap();
    let ours = model.tensor("w").unwrap();
    let theirs = SafeTensors::deserialize(&file).unwrap();
    let theirs = theirs.tensor("w").unwrap();

    let mut group = c.benchmark_group("slice-columns-1024x1024");
    group.bench_function("maptensors", |b| {
        let columns = [Index::from(..), Index::from(256..768)];
        b.iter(|| ours.slice(&columns).unwrap().to_bytes().len());
    });
    group.bench_function("safetensors", |b| {
        use safetensors::slice::IndexOp;
        b.iter(|| theirs.slice((.., 256..768)).unwrap().fold(Vec::new(), joined).len());
    });
    group.finish();

    let mut group = c.benchmark_group("slice-rows-1024x1024");
    group.bench_function("maptensors", |b| {
        let rows = [Index::from(256..768)];
        b.iter(|| ours.slice(&rows).unwrap().to_bytes().len());
    });
    group.bench_function("safetensors", |b| {
        use safetensors::slice::IndexOp;
        b.iter(|| theirs.slice(256..768).unwrap().map(<[u8]>::len).sum::<usize>());
    });
    group.finish();
}

fn joined(mut all: Vec<u8>, piece: &[u8]) -> Vec<u8> {
    all.extend_from_slice(piece);
    all
}

fn saving(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved.safetensors");
    let bytes = vec![7; SAVED / 16];
    let tensors = || (0..16).map(|i| (format!("w{i}"), (DType::F32, [SAVED / 64], &bytes)));
    let gone = || drop(std::fs::remove_file(&path));

    let mut group = c.benchmark_group("save-64MiB-no-fsync");
    group.sample_size(20);
    group.bench_function("maptensors", |b| {
        let options = || SaveOptions::new().durable(false);
        b.iter_batched(gone, |()| options().save(tensors(), &path).unwrap(), BatchSize::PerIteration);
    });
    group.bench_function("safetensors", |b| {
        let theirs =
            |bytes| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![SAVED / 64], bytes);
        let theirs = || (0..16).map(|i| (format!("w{i}"), theirs(&bytes).unwrap()));
        let save = || safetensors::serialize_to_file(theirs(), None, &path).unwrap();
        b.iter_batched(gone, |()| save(), BatchSize::PerIteration);
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    targets = opening, slicing, saving
}
criterion_main!(benches);
