//! `maptensors` loads, edits, shares and saves machine-learning weights without copying them.
//!
//! A model file is a [`Layout`] — which tensors there are, and where — seen through a [`Mapping`] — bytes
//! in memory that the kernel backs with the file. Opening parses a layout and maps the file; saving plans
//! a layout and maps a new file. Nothing in between serializes anything. Files are `safetensors`, readable
//! by everything that reads those.
//!
//! # Load
//!
//! ```
//! use maptensors::Model;
//!
//! // A file, a directory, or a model.safetensors.index.json.
//! // SAFETY: nobody writes to the file while it is mapped (renaming over it is fine).
//! let model = unsafe { Model::open("models/digits.safetensors")? };
//! let w: &[f32] = model.tensor("fc1.weight")?.as_slice()?; // checked by bytemuck, zero-copy
//! assert_eq!(w.len(), 64 * 64);
//! # Ok::<(), maptensors::Error>(())
//! ```
//!
//! # Edit
//!
//! ```
//! use maptensors::ModelMut;
//!
//! # let out = std::env::temp_dir().join("maptensors-doc-edit.safetensors");
//! // SAFETY: as above.
//! let mut tuned = unsafe { ModelMut::open("models/digits.safetensors")? }; // copy-on-write
//! tuned.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] += 1.0; // the file never changes
//! tuned.save(&out)?;
//! # std::fs::remove_file(out).unwrap();
//! # Ok::<(), maptensors::Error>(())
//! ```
//!
//! # Save
//!
//! ```
//! use maptensors::{DType, Draft, Layout};
//!
//! # let out = std::env::temp_dir().join("maptensors-doc-make.safetensors");
//! let layout = Layout::builder().tensor("w", DType::F32, &[2, 3]).metadata("format", "pt").build()?;
//! let mut draft = Draft::create(&out, &layout)?; // allocated, mapped, invisible
//! draft.tensor_mut("w")?.as_mut_slice::<f32>()?.fill(0.5);
//! draft.commit()?; // synced, then renamed into place
//! # std::fs::remove_file(out).unwrap();
//! # Ok::<(), maptensors::Error>(())
//! ```
//!
//! [`save`] does the same for tensors that exist already, of any type that is a [`SaveTensor`].
//!
//! # What changed
//!
//! ```
//! use maptensors::{Model, ModelMut, apply_delta, save_delta};
//!
//! # let out = std::env::temp_dir().join("maptensors-doc-lib-delta.safetensors");
//! // SAFETY: as above.
//! let mut tuned = unsafe { ModelMut::open("models/digits.safetensors")? };
//! tuned.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] = 0.5;
//! assert_eq!(tuned.changed()?.elements(), 1); // the kernel knows which pages were written
//! save_delta(&tuned, &out)?; // that element, and which model it is for
//! let again = apply_delta(ModelMut::read("models/digits.safetensors")?, &[Model::read(&out)?])?;
//! assert_eq!(again.tensor("fc1.bias")?.as_slice::<f32>()?[0], 0.5);
//! # std::fs::remove_file(out).unwrap();
//! # Ok::<(), maptensors::Error>(())
//! ```
//!
//! # Edit the file itself
//!
//! ```
//! use maptensors::ModelShared;
//!
//! # let path = std::env::temp_dir().join("maptensors-doc-lib-shared.safetensors");
//! # std::fs::copy("models/digits.safetensors", &path).unwrap();
//! // SAFETY: nobody truncates the file. Others may write to it: elements are copied, never borrowed.
//! let live = unsafe { ModelShared::open(&path)? };
//! live.tensor("fc1.bias")?.store(0, 0.5_f32)?; // in the file, for everyone who maps it
//! live.flush_all()?; // and on the disk
//! # std::fs::remove_file(path).unwrap();
//! # Ok::<(), maptensors::Error>(())
//! ```
//!
//! # Share
//!
//! ```
//! use maptensors::{Model, ModelMut, Publisher, Subscriber};
//!
//! # let place = std::env::temp_dir().join(format!("maptensors-doc-lib-share-{}", std::process::id()));
//! let model = Model::read("models/digits.safetensors")?;
//! let mut publisher = Publisher::open(&place)?; // a name alone stands for a place in memory
//! publisher.publish(model.tensors().map(|t| (t.name(), t)))?;
//!
//! // In any number of other processes. SAFETY: only publishers write to the publication's files.
//! let mut weights = unsafe { Subscriber::attach(&place)? };
//! let mut tuned = ModelMut::read("models/digits.safetensors")?;
//! tuned.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[0] += 1.0;
//! publisher.publish_changed([("fc1.bias", tuned.tensor("fc1.bias")?)])?; // the rest stays the same pages
//! assert!(weights.wait(None)?);
//! assert_eq!(weights.refresh()?.unwrap().changed, ["fc1.bias"]);
//! assert_eq!(weights.model().len(), 4);
//! # publisher.remove()?;
//! # Ok::<(), maptensors::Error>(())
//! ```
//!
//! # More model than memory
//!
//! ```
//! use maptensors::{Model, Select, StreamOptions};
//!
//! // SAFETY: as above.
//! let model = unsafe { Model::open("models/digits.safetensors")? };
//! model.prefetch(Select::matching(|name| name.starts_with("fc1.")))?.wait()?; // in the background until then
//! for tensor in model.stream(StreamOptions::new().budget(2 << 30))? {
//!     let _bytes = tensor?.as_bytes(); // read ahead of here, given back behind
//! }
//! model.evict(..)?;
//! # Ok::<(), maptensors::Error>(())
//! ```
//!
//! # What you may rely on
//!
//! - **Zero-copy.** [`Model::open`] reads headers; [`TensorView::as_slice`] is a pointer into the mapping. A
//!   page is read when it is first touched, and copied when [`ModelMut`] first writes it.
//! - **The stable-file contract.** Mapping a file that others write to is undefined behaviour, hence
//!   `unsafe fn open`; its text is under [`Model::open`]. [`Model::read`] is the safe twin, over owned memory.
//!   [`OpenOptions::guard`] turns most breaches into errors, and says which not; [`MapOptions`] goes through
//!   everything that mmap(2) can do.
//! - **Hostile files are errors.** Sizes, counts and offsets are checked before anything is allocated or
//!   touched; what is accepted is what the `safetensors` crate accepts, less its leniencies.
//! - **Saves are atomic.** A reader sees the old file or the new one; a failed save leaves the old one and
//!   nothing else. Durable unless told otherwise. Not promised: power loss on a network file
//!   system, and anything about hard links to a replaced file.
//! - **Same input, same bytes**, with every large tensor on a page boundary.
//!
//! # Features
//!
//! None by default. `cli` builds the `maptensors` command, `python` the extension module of the wheel.
//! `serde` makes plain answers serializable, and all but [`Layout`] and [`TensorInfo`] deserializable: those two,
//! [`DType`] and [`ErrorKind`] by their names, [`Residency`], [`Evicted`], [`Changes`], [`Differences`], [`Edited`],
//! [`Backing`], [`Advice`], [`Split`], [`Verify`]. `safetensors` saves what is a `View` of the `safetensors` crate, version
//! 0.8 (`FromView`), and converts between its `Dtype` and [`DType`].
//!
//! [`struct@f16`] and [`bf16`] are those of the `half` crate, version 2; [`Complex32`] is that of `num-complex`, version 0.4.

// The demo's walk is one text, compiled into the example and the command: both call the crate by name.
#[cfg(feature = "cli")]
extern crate self as maptensors;

mod checkpoint;
#[cfg(test)]
mod crash;
mod delta;
mod diff;
mod dtype;
mod error;
mod format;
mod layout;
mod map;
mod model;
mod os;
mod paging;
mod rank;
mod save;
mod share;
mod source;
mod sync;
mod tensor;
mod work;

#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "python")]
mod python;

pub use checkpoint::{CheckpointOptions, Checkpointer, Ready, Saved, Saving};
pub use delta::{apply_delta, materialize, save_delta, save_diff};
pub use diff::{Change, Changes, Differences, Reshaped, Verify};
pub use dtype::{
    Block, DType, Element, F4x2, F6E2M3x4, F6E3M2x4, F8E4M3, F8E4M3Fnuz, F8E5M2, F8E5M2Fnuz, F8E8M0,
    UnknownDType,
};
pub use error::{Error, ErrorKind, Result};
pub use half::{bf16, f16};
pub use layout::{
    Array, Format, Item, Layout, LayoutBuilder, MAX_RANK, Metadata, MetadataIter, Select, TensorInfo,
    TensorInfos, Value,
};
pub use map::{Advice, Backing, Evicted, MapOptions, Mapping, Residency, SharedMemory};
#[cfg(target_os = "linux")]
pub use map::{Memfd, SealedMemfd};
pub use model::{
    Content, Files, Model, ModelMut, ModelRef, ModelShared, OpenFrom, OpenOptions, OverMemory, ReadFrom,
    Stream, Tensors, diff,
};
pub use num_complex::Complex32;
pub use paging::{Order, Prefetch, StreamOptions};
pub use rank::{RankPlan, RankView, Split};
#[cfg(feature = "safetensors")]
pub use save::FromView;
pub use save::{Draft, DraftOptions, Edited, HeaderEdit, SaveOptions, SaveTensor, TensorBytes, save};
pub use share::{AttachOptions, Publication, PublishOptions, Publisher, Refreshed, Subscriber};
pub use tensor::{Index, Tensor, TensorShared, TensorSlice, TensorView, TensorViewMut};

#[cfg(test)]
use skips::skipped;

#[cfg(test)]
mod skips {
    use std::io::Write as _;
    use std::panic::Location;

    /// Says that a unit test, or a part of it, was not run, as `skip` in `tests/common` does.
    #[track_caller]
    pub(crate) fn skipped(test: &str, why: impl std::fmt::Display) {
        let line = format!("{} {test}: {why}", Location::caller().file()).replace('\n', " ");
        let _ = writeln!(std::io::stderr(), "\n!!! SKIPPED: {line}\n");
        if let Some(path) = std::env::var_os("MAPTENSORS_SKIPS") {
            let file = std::fs::File::options().append(true).create(true).open(path);
            file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
                .expect("MAPTENSORS_SKIPS");
        }
    }
}
