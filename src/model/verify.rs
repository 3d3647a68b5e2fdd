//! Checking a model against the checksums that it carries.

use super::Model;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;

impl Model {
    /// Checks every tensor, as it is now, against the checksum that the file carries: reads everything. Files
    /// carry checksums when they were saved with [`SaveOptions::checksums`](crate::SaveOptions::checksums).
    ///
    /// # Errors
    /// [`Error::Checksum`] names the tensors that differ; [`Error::Argument`] if there are no checksums,
    /// [`Error::Json`] if they are malformed.
    ///
    /// ```
    /// use maptensors::{Error, Model, SaveOptions};
    ///
    /// let path = std::env::temp_dir().join("maptensors-doc-verify.safetensors");
    /// let model = Model::read("models/digits.safetensors")?;
    /// assert!(model.verify().is_err()); // it carries none
    /// SaveOptions::new().checksums(true).save(model.tensors().map(|t| (t.name(), t)), &path)?;
    /// Model::read(&path)?.verify()?;
    /// let mut bytes = std::fs::read(&path).unwrap();
    /// *bytes.last_mut().unwrap() ^= 1;
    /// std::fs::write(&path, bytes).unwrap();
    /// assert!(matches!(Model::read(&path)?.verify(), Err(Error::Checksum { .. })));
    /// # std::fs::remove_file(path).unwrap();
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn verify(&self) -> Result<()> {
        self.contents().verify()
    }

    /// Where an index's `metadata.total_size` is not the bytes that its tensors take: what it says, and what they
    /// take. Such a model is sound all the same: nothing relies on that number, and many tools write it wrong. A
    /// model opened without an index has none.
    ///
    /// ```
    /// let model = maptensors::Model::read("models/digits-sharded")?;
    /// assert_eq!(model.misstated_size(), None);
    /// # Ok::<(), maptensors::Error>(())
    /// ```
    pub fn misstated_size(&self) -> Option<(u64, u64)> {
        self.catalog.misstated_size()
    }
}
