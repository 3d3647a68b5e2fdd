//! A delta file, read as what a stranger may have written.

use super::{GAPS, Header, LENGTHS, VALUES, VERSION, WHOLE, invalid};
use crate::diff::digest;
use crate::dtype::DType;
use crate::error::Result;
use crate::layout::TensorInfo;
use crate::model::Model;
use crate::save::DELTA;
use crate::tensor::TensorView;
use std::collections::BTreeMap;
use std::path::Path;

/// A delta: what it says, and the tensors that say it.
pub(super) struct Delta<'a> {
    pub(super) path: &'a Path,
    pub(super) base: u128,
    pub(super) result: u128,
    pub(super) removed: Vec<String>,
    pub(super) metadata: Option<BTreeMap<String, String>>,
    pub(super) checksums: bool,
    /// In the file's order of first mention.
    pub(super) tensors: Vec<(&'a str, Part<'a>)>,
}

/// What it says of one tensor.
pub(super) enum Part<'a> {
    Whole(TensorView<'a>),
    Edits(Edits<'a>),
}

/// Elements to replace.
pub(super) struct Edits<'a> {
    gaps: TensorView<'a>,
    lengths: Option<TensorView<'a>>,
    values: TensorView<'a>,
}

/// Tensors of the file that are about one tensor.
#[derive(Default)]
struct Parts<'a> {
    whole: Option<TensorView<'a>>,
    gaps: Option<TensorView<'a>>,
    lengths: Option<TensorView<'a>>,
    values: Option<TensorView<'a>>,
}

impl<'a> Delta<'a> {
    /// # Errors
    /// [`crate::Error::Delta`].
    pub(super) fn parse(model: &'a Model) -> Result<Self> {
        let path = model.path(0).unwrap_or(Path::new(""));
        let fault = |what: String| invalid(path, "", what);
        let text = model
            .metadata()
            .text(DELTA)
            .ok_or_else(|| fault(format!("there is no {DELTA:?} in its metadata")))?;
        let header: Header =
            serde_json::from_str(text).map_err(|error| fault(format!("{DELTA:?}: {error}")))?;
        if header.version != VERSION {
            return Err(fault(format!("it is of version {}, this is version {VERSION}", header.version)));
        }
        let id = |text: &str| digest::parse_hex(text).ok_or_else(|| fault("an identity is 32 digits".into()));
        let (base, result) = (id(&header.base)?, id(&header.result)?);
        let mut order = Vec::new();
        let mut parts: BTreeMap<&str, Parts<'a>> = BTreeMap::new();
        for view in model.tensors() {
            let (kind, name) = view.name().split_once(':').unwrap_or((view.name(), ""));
            let kind = &view.name()[..view.name().len().min(kind.len() + 1)];
            let entry = parts.entry(name).or_insert_with(|| {
                order.push(name);
                Parts::default()
            });
            *match kind {
                WHOLE => &mut entry.whole,
                GAPS => &mut entry.gaps,
                LENGTHS => &mut entry.lengths,
                VALUES => &mut entry.values,
                _ => return Err(invalid(path, view.name(), "a delta holds no such tensor")),
            } = Some(view);
        }
        let mut tensors = Vec::new();
        for name in order {
            let part = match parts.remove(name).unwrap_or_default() {
                Parts { whole: Some(whole), gaps: None, lengths: None, values: None } => Part::Whole(whole),
                Parts { whole: None, gaps: Some(gaps), lengths, values: Some(values) } => {
                    Part::Edits(Edits { gaps, lengths, values })
                }
                _ => return Err(invalid(path, name, "it is there in parts that do not belong together")),
            };
            tensors.push((name, part));
        }
        let Header { removed, metadata, checksums, .. } = header;
        Ok(Self { path, base, result, removed, metadata, checksums, tensors })
    }
}

impl Edits<'_> {
    /// Replaces elements of a tensor, whose bytes these are. After an error they are some mixture.
    ///
    /// # Errors
    /// [`crate::Error::Delta`].
    pub(super) fn apply(&self, path: &Path, info: &TensorInfo<'_>, bytes: &mut [u8]) -> Result<()> {
        let fault = |what: String| invalid(path, info.name(), what);
        let unit = info.dtype().itemsize().unwrap_or(1);
        let expected = if info.dtype().itemsize().is_some() { info.dtype() } else { DType::U8 };
        if self.values.dtype() != expected {
            return Err(fault(format!(
                "its values are {}, the tensor is {}",
                self.values.dtype(),
                info.dtype()
            )));
        }
        let gaps = Numbers::of(&self.gaps).ok_or_else(|| fault("its gaps are no list of numbers".into()))?;
        let lengths = match &self.lengths {
            None => None,
            Some(view) => {
                Some(Numbers::of(view).ok_or_else(|| fault("its lengths are no list of numbers".into()))?)
            }
        };
        if self.values.shape().len() != 1 {
            return Err(fault("its values are no list".into()));
        }
        let mut values = self.values.as_bytes();
        let counted = lengths.as_ref().map_or(values.len() / unit, Numbers::len);
        if counted != gaps.len() {
            return Err(fault(format!("{} gaps do not go with {counted}", gaps.len())));
        }
        let mut at = 0usize;
        for i in 0..gaps.len() {
            let length = lengths.as_ref().map_or(Some(1), |lengths| lengths.at(i));
            let start = gaps.at(i).and_then(|gap| at.checked_add(gap));
            let range = start.zip(length).and_then(|(start, length)| {
                let range = start.checked_mul(unit)?..start.checked_add(length)?.checked_mul(unit)?;
                (length > 0).then_some(range)
            });
            let Some(to) = range.clone().and_then(|range| bytes.get_mut(range)) else {
                return Err(fault(format!("run {i} is empty, or leaves the tensor")));
            };
            let Some((from, rest)) = values.split_at_checked(to.len()) else {
                return Err(fault(format!("run {i} has too few values")));
            };
            to.copy_from_slice(from);
            values = rest;
            at = range.map_or(at, |range| range.end / unit);
        }
        if values.is_empty() { Ok(()) } else { Err(fault("there are more values than runs take".into())) }
    }
}

/// A list of unsigned numbers of some width.
struct Numbers<'a> {
    bytes: &'a [u8],
    width: usize,
}

impl<'a> Numbers<'a> {
    fn of(view: &TensorView<'a>) -> Option<Self> {
        let width = match view.dtype() {
            DType::U8 => 1,
            DType::U16 => 2,
            DType::U32 => 4,
            DType::U64 => 8,
            _ => return None,
        };
        (view.shape().len() == 1).then(|| Self { bytes: view.as_bytes(), width })
    }

    fn len(&self) -> usize {
        self.bytes.len() / self.width
    }

    /// `None` also for a number that no place in memory has.
    fn at(&self, i: usize) -> Option<usize> {
        let bytes = self.bytes.get(i * self.width..(i + 1) * self.width)?;
        let mut number = [0; 8];
        number[..self.width].copy_from_slice(bytes);
        usize::try_from(u64::from_le_bytes(number)).ok()
    }
}
