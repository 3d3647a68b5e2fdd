//! What changed: [`Changes`].

use std::collections::HashMap;

/// How much of one tensor changed.
///
/// ```
/// # // SAFETY: nobody writes to the file while it is mapped.
/// # let mut model = unsafe { maptensors::ModelMut::open("models/digits.safetensors")? };
/// model.tensor_mut("fc1.bias")?.as_mut_slice::<f32>()?[..3].fill(9.0);
/// let changes = model.changed()?;
/// let bias = changes.get("fc1.bias").unwrap();
/// assert_eq!((bias.elements, bias.bytes, bias.pages), (3, 12, 1));
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Change {
    /// The tensor's name.
    pub name: String,
    /// Elements that differ. Where elements are packed several to the byte, bytes are counted.
    pub elements: usize,
    /// Bytes that those elements take.
    pub bytes: usize,
    /// Pages that hold any of them.
    pub pages: usize,
    /// Bytes of the whole tensor.
    pub nbytes: u64,
}

/// Which tensors differ from how they were, in file order, and by how much.
///
/// ```
/// use maptensors::ModelMut;
///
/// // SAFETY: nobody writes to the file while it is mapped.
/// let mut model = unsafe { ModelMut::open("models/digits.safetensors")? };
/// model.tensor_mut("fc2.bias")?.as_mut_slice::<f32>()?[0] += 1.0;
/// let changes = model.changed()?;
/// assert!(changes.contains("fc2.bias") && !changes.contains("fc1.weight"));
/// assert_eq!(changes.elements(), 1);
/// # Ok::<(), maptensors::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(from = "Listed", into = "Listed"))]
pub struct Changes {
    tensors: Vec<Change>,
    places: HashMap<String, usize>,
    private_pages: usize,
}

impl Changes {
    pub(crate) fn new(tensors: Vec<Change>, private_pages: usize) -> Self {
        let places = tensors.iter().enumerate().map(|(i, change)| (change.name.clone(), i)).collect();
        Self { tensors, places, private_pages }
    }

    /// Number of tensors that changed.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The tensors that changed, in file order.
    pub fn iter(&self) -> std::slice::Iter<'_, Change> {
        self.tensors.iter()
    }

    /// How much of the tensor called `name` changed, if any.
    pub fn get(&self, name: &str) -> Option<&Change> {
        self.places.get(name).and_then(|&place| self.tensors.get(place))
    }

    /// Whether the tensor called `name` changed.
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Elements that changed, of all tensors.
    pub fn elements(&self) -> usize {
        self.tensors.iter().map(|change| change.elements).sum()
    }

    /// Bytes that those elements take.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|change| change.bytes).sum()
    }

    /// Pages of the model that are this process's own, changed or not: written, or promoted.
    pub fn private_pages(&self) -> usize {
        self.private_pages
    }
}

impl<'a> IntoIterator for &'a Changes {
    type Item = &'a Change;
    type IntoIter = std::slice::Iter<'a, Change>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// [`Changes`] as they are serialized.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
struct Listed {
    tensors: Vec<Change>,
    private_pages: usize,
}

#[cfg(feature = "serde")]
impl From<Changes> for Listed {
    fn from(changes: Changes) -> Self {
        Self { tensors: changes.tensors, private_pages: changes.private_pages }
    }
}

#[cfg(feature = "serde")]
impl From<Listed> for Changes {
    fn from(listed: Listed) -> Self {
        Self::new(listed.tensors, listed.private_pages)
    }
}
