//! What there is to say about a model: what `--json` prints, and what the tables are made from.

use crate::{DType, Metadata, Model, TensorView};
use globset::GlobSet;
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// The keys of `--json`, in this order, are an interface: add, but do not rename.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    pub(super) path: Cow<'a, str>,
    /// Of what is published.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) generation: Option<u64>,
    pub(super) shards: Vec<Shard<'a>>,
    /// `None`: not to be listed.
    pub(super) tensors: Option<Vec<Tensor<'a>>>,
    #[serde(serialize_with = "texts")]
    pub(super) metadata: &'a Metadata,
    pub(super) totals: Totals,
}

/// One file.
#[derive(Serialize)]
pub(super) struct Shard<'a> {
    pub(super) file: Cow<'a, str>,
    pub(super) tensors: usize,
    pub(super) nbytes: u64,
    pub(super) data_start: u64,
}

#[derive(Serialize)]
pub(super) struct Tensor<'a> {
    pub(super) name: &'a str,
    #[serde(serialize_with = "dtype_name")]
    pub(super) dtype: DType,
    pub(super) shape: &'a [usize],
    pub(super) shard: Cow<'a, str>,
    /// The shard's place among the shards.
    #[serde(skip)]
    pub(super) shard_index: usize,
    pub(super) offset: u64,
    pub(super) nbytes: u64,
    pub(super) alignment: u64,
    /// Whether that is enough for the dtype.
    pub(super) aligned: bool,
}

/// Sums over the tensors that the filter lets through.
#[derive(Serialize, Default)]
pub(super) struct Totals {
    pub(super) tensors: usize,
    pub(super) elements: u64,
    pub(super) nbytes: u64,
    /// Tensors whose place is not aligned for their dtype.
    pub(super) misaligned: usize,
    /// Bytes in tensors that start on a 64-byte boundary.
    pub(super) nbytes_aligned_64: u64,
    /// The largest first.
    pub(super) dtypes: Vec<DTypeTotal>,
}

#[derive(Serialize)]
pub(super) struct DTypeTotal {
    #[serde(serialize_with = "dtype_name")]
    pub(super) dtype: DType,
    pub(super) tensors: usize,
    pub(super) elements: u64,
    pub(super) nbytes: u64,
}

impl<'a> Report<'a> {
    pub(super) fn new(
        path: &'a Path,
        generation: Option<u64>,
        model: &'a Model,
        filter: Option<&GlobSet>,
    ) -> Self {
        let shards: Vec<Shard> = (0..model.shards())
            .filter_map(|i| Some((file_name(model.path(i)?), model.layout(i)?)))
            .map(|(file, layout)| Shard {
                file,
                tensors: layout.len(),
                nbytes: layout.file_len(),
                data_start: layout.data_start(),
            })
            .collect();
        // A model lists its tensors shard by shard.
        let shard_of = shards.iter().enumerate().flat_map(|(i, shard)| std::iter::repeat_n(i, shard.tensors));
        let tensors: Vec<Tensor> = shard_of
            .zip(model.tensors())
            .filter(|(_, tensor)| filter.is_none_or(|globs| globs.is_match(tensor.name())))
            .map(|(shard, tensor)| Tensor::new(&tensor, shard, shards[shard].file.clone()))
            .collect();
        let totals = Totals::new(&tensors);
        Self {
            path: path.to_string_lossy(),
            generation,
            shards,
            tensors: Some(tensors),
            metadata: model.metadata(),
            totals,
        }
    }

    /// With or without the list of tensors.
    pub(super) fn listing(mut self, list: bool) -> Self {
        self.tensors = self.tensors.filter(|_| list);
        self
    }
}

impl<'a> Tensor<'a> {
    fn new(tensor: &TensorView<'a>, shard_index: usize, shard: Cow<'a, str>) -> Self {
        let info = tensor.info();
        Self {
            name: info.name(),
            dtype: info.dtype(),
            shape: info.shape(),
            shard,
            shard_index,
            offset: info.offset(),
            nbytes: info.nbytes(),
            alignment: info.alignment(),
            aligned: tensor.is_aligned(),
        }
    }

    fn elements(&self) -> u64 {
        // A zero among dimensions whose product overflows is legal.
        if self.shape.contains(&0) { 0 } else { self.shape.iter().map(|&dim| dim as u64).product() }
    }
}

impl Totals {
    fn new(tensors: &[Tensor]) -> Self {
        let mut totals = Self::default();
        let mut dtypes = BTreeMap::new();
        for tensor in tensors {
            let dtype = tensor.dtype;
            let of_dtype =
                dtypes.entry(dtype).or_insert(DTypeTotal { dtype, tensors: 0, elements: 0, nbytes: 0 });
            of_dtype.tensors += 1;
            of_dtype.elements += tensor.elements();
            of_dtype.nbytes += tensor.nbytes;
            totals.tensors += 1;
            totals.elements += tensor.elements();
            totals.nbytes += tensor.nbytes;
            totals.misaligned += usize::from(!tensor.aligned);
            if tensor.alignment >= 64 {
                totals.nbytes_aligned_64 += tensor.nbytes;
            }
        }
        totals.dtypes = dtypes.into_values().collect();
        totals.dtypes.sort_by_key(|of_dtype| std::cmp::Reverse(of_dtype.nbytes));
        totals
    }
}

fn file_name(path: &Path) -> Cow<'_, str> {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy()
}

fn texts<S: serde::Serializer>(metadata: &Metadata, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(metadata.iter().map(|(key, value)| (key, value.to_string())))
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn dtype_name<S: serde::Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}
