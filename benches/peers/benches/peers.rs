//! candle, on the file that `inner` uses: open and look at every one of 20,000 tensors.

use std::hint::black_box;

use candle_core::Device;
use candle_core::safetensors::MmapedSafetensors;
use criterion::{Criterion, criterion_group, criterion_main};
use maptensors::{DType, Model};

const TENSORS: usize = 20_000;

fn peers(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("many.safetensors");
    let bytes = [0; 64 * 4];
    let views = (0..TENSORS).map(|i| (format!("model.layers.{i}.bias"), (DType::F32, [64], bytes)));
    maptensors::save(views, &path).unwrap();

    let mut group = c.benchmark_group("candle-20000");
    group.bench_function("maptensors", |b| {
        b.iter(|| {
            // SAFETY: the file is in a directory of its own, and only read from here on.
            let model = unsafe { Model::open(&path) }.unwrap();
            model.tensors().map(|tensor| black_box(tensor.as_bytes()).len()).sum::<usize>()
        });
    });
    group.bench_function("candle, views", |b| {
        b.iter(|| {
            // SAFETY: as above.
            let model = unsafe { MmapedSafetensors::new(&path) }.unwrap();
            model.tensors().iter().map(|(_, tensor)| black_box(tensor.data()).len()).sum::<usize>()
        });
    });
    group.sample_size(20);
    group.bench_function("candle, tensors", |b| {
        b.iter(|| {
            // SAFETY: as above.
            let model = unsafe { MmapedSafetensors::new(&path) }.unwrap();
            let names: Vec<_> = model.tensors().into_iter().map(|(name, _)| name).collect();
            names.iter().map(|name| model.load(name, &Device::Cpu).unwrap().elem_count()).sum::<usize>()
        });
    });
    group.finish();
}

criterion_group!(benches, peers);
criterion_main!(benches);
