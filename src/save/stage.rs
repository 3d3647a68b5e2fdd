//! From tensors to a file that is filled: planned, copied, brought.

use super::tensor::{Kind, SaveTensor};
use super::{Commit, Draft};
use crate::error::Result;
use crate::layout::{Layout, Metadata};
use crate::map::RawSlice;
#[cfg(feature = "python")]
use {super::SharedDraft, crate::map::SharedMemory, crate::work::Progress, std::sync::Arc};

/// A file that is filled, up to its commit.
pub(crate) struct Staged {
    pub(crate) commit: Commit,
    /// What the caller has yet to write, before the commit.
    #[cfg(feature = "python")]
    pub(crate) later: Vec<Later>,
}

/// The place of a tensor that its caller writes.
#[cfg(feature = "python")]
pub(crate) struct Later {
    /// Which of the tensors that were staged.
    pub(crate) tensor: usize,
    pub(crate) memory: Arc<SharedMemory>,
    /// Of the first byte.
    pub(crate) offset: usize,
    pub(crate) progress: Progress,
}

/// The layout of a file of these tensors.
///
/// # Errors
/// As [`LayoutBuilder::build`](crate::LayoutBuilder::build).
pub(crate) fn plan<T: SaveTensor>(tensors: &[(String, T)], metadata: Option<&Metadata>) -> Result<Layout> {
    let mut builder = Layout::builder().with_metadata(metadata.cloned());
    for (name, tensor) in tensors {
        builder = builder.tensor(name, tensor.dtype(), tensor.shape());
    }
    builder.build()
}

/// Fills a draft that was planned for these tensors, up to its commit.
///
/// # Errors
/// As [`fill`].
#[cfg_attr(not(feature = "python"), allow(unused_variables))]
pub(crate) fn stage<T: SaveTensor>(mut draft: Draft, tensors: &[(String, T)]) -> Result<Staged> {
    let later = fill(&mut draft, tensors)?;
    #[cfg(not(feature = "python"))]
    debug_assert!(later.is_empty());
    #[cfg(feature = "python")]
    if !later.is_empty() {
        let progress = draft.progress();
        let draft = SharedDraft::new(draft)?;
        let place = |tensor: usize| {
            let info = draft.layout().get(&tensors[tensor].0)?;
            let (memory, offset) = (draft.memory().clone(), info.bytes().start);
            Some(Later { tensor, memory, offset, progress: progress.clone() })
        };
        let later = later.into_iter().filter_map(place).collect();
        return Ok(Staged { commit: Box::new(move || draft.commit().map(|()| None)), later });
    }
    Ok(Staged {
        commit: Box::new(move || draft.commit_mapped()),
        #[cfg(feature = "python")]
        later: Vec::new(),
    })
}

/// Copies tensors into a draft that was planned for them; which of them their caller has yet to write.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) for bytes that are not as many as the tensor's;
/// [`Error::Io`](crate::Error::Io).
// Without Python nothing comes later.
#[cfg_attr(not(feature = "python"), allow(unused_mut, unused_variables))]
pub(super) fn fill<T: SaveTensor>(draft: &mut Draft, tensors: &[(String, T)]) -> Result<Vec<usize>> {
    // What lies in memory is filled in one parallel go at the end; what has to be brought is filled at once, so that no
    // two such copies exist together.
    let mut lying = Vec::with_capacity(tensors.len());
    let mut later = Vec::new();
    for (at, (name, tensor)) in tensors.iter().enumerate() {
        // Planned just now, from these very names.
        let index = draft.layout().position(name).unwrap_or_default();
        match tensor.bytes().0 {
            Kind::Lying(bytes) => lying.push((index, bytes)),
            Kind::Owned(bytes) => draft.fill(vec![(index, RawSlice::from(&*bytes))])?,
            Kind::Written(write) => draft.bring(index, write)?,
            #[cfg(feature = "python")]
            Kind::Later => {
                // Nothing is in the file yet: Python's tensors lie in memory, or come later.
                draft.materialize()?;
                later.push(at);
            }
        }
    }
    draft.fill(lying)?;
    Ok(later)
}
