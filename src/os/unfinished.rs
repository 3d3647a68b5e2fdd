//! Files that are removed where the work on them is canceled.

use super::disk::Dir;
use super::fork::Owner;
use crate::work::cancel::{Cancel, current};
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::Arc;

/// An unfinished file, to be removed when the work is canceled that this thread does.
pub(crate) struct Unfinished {
    cancel: Option<Cancel>,
    /// Of what undoes it, with `cancel`.
    number: Option<u64>,
    /// The name to remove; a file without a name goes by itself.
    name: Option<OsString>,
    owner: Owner,
}

impl Unfinished {
    pub(crate) fn new(dir: &Arc<Dir>, name: Option<&OsStr>) -> Self {
        let mut file = Self { cancel: None, number: None, name: name.map(Into::into), owner: Owner::me() };
        // Canceled already: it is not published.
        file.take_on(dir).ok();
        file
    }

    /// From now on it belongs to this thread's work.
    ///
    /// # Errors
    /// `ECANCELED`: canceled already.
    pub(crate) fn take_on(&mut self, dir: &Arc<Dir>) -> io::Result<()> {
        self.forget();
        self.cancel = current();
        if let Some(cancel) = &self.cancel {
            let mut begun = cancel.begun()?;
            self.number = self.name.clone().map(|name| begun.add(removing(dir, name)));
        }
        Ok(())
    }

    /// Has the file under the name that `give` gives it, in place of the one that it had, unless the work is canceled.
    ///
    /// # Errors
    /// `ECANCELED`, and those of `give`.
    pub(crate) fn named(
        &mut self,
        dir: &Arc<Dir>,
        give: impl FnOnce() -> io::Result<OsString>,
    ) -> io::Result<()> {
        let Some(cancel) = &self.cancel else {
            self.name = Some(give()?);
            return Ok(());
        };
        let mut begun = cancel.begun()?;
        let name = give()?;
        if let Some(number) = self.number.take() {
            begun.remove(number);
        }
        self.number = Some(begun.add(removing(dir, name.clone())));
        self.name = Some(name);
        Ok(())
    }

    fn forget(&mut self) {
        // In a fork's child the lock may be held by a thread that is not there.
        if let (Some(cancel), Some(number), true) = (&self.cancel, self.number.take(), self.owner.is_me()) {
            cancel.forget(number);
        }
    }

    /// Gives the file its name, unless the work is canceled.
    ///
    /// # Errors
    /// `ECANCELED`, and those of `rename`.
    pub(crate) fn finish(&self, rename: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Some(cancel) = &self.cancel else { return rename() };
        let mut begun = cancel.begun()?;
        if let Some(number) = self.number {
            begun.remove(number);
        }
        rename()
    }
}

fn removing(dir: &Arc<Dir>, name: OsString) -> impl FnOnce() + Send + 'static {
    let dir = dir.clone();
    move || {
        dir.remove(&name).ok();
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::cancel::{check, under, unless_canceled};

    #[test]
    fn what_is_canceled_loses_its_unfinished_files_and_what_is_finished_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = Arc::new(Dir::open(temporary.path()).unwrap());
        let cancel = Cancel::default();
        let begin = |name: &str| {
            std::fs::write(temporary.path().join(name), b"").unwrap();
            Unfinished::new(&dir, Some(name.as_ref()))
        };
        under(Some(cancel.clone()), || {
            let (first, mut second) = (begin("a.tmp"), begin("b.tmp"));
            second.take_on(&dir).unwrap();
            first.finish(|| dir.rename("a.tmp".as_ref(), "a".as_ref())).unwrap();
            let give = |name: &str| {
                std::fs::write(temporary.path().join(name), b"").unwrap();
                Ok(name.into())
            };
            // One without a name gets one, and another; another gets none before it is canceled.
            let (mut named, mut unnamed) = (Unfinished::new(&dir, None), Unfinished::new(&dir, None));
            named.named(&dir, || give("d.tmp")).unwrap();
            named.named(&dir, || dir.remove("d.tmp".as_ref()).and_then(|()| give("e.tmp"))).unwrap();
            check().unwrap();
            cancel.cancel();
            assert!(unnamed.named(&dir, || give("f.tmp")).is_err());
            assert_eq!(check().unwrap_err().raw_os_error(), Some(libc::ECANCELED));
            assert!(second.finish(|| Ok(())).is_err());
            assert!(second.take_on(&dir).is_err() && unless_canceled(|| Ok(())).is_err());
        });
        check().unwrap();
        assert_eq!(dir.names().unwrap(), ["a"]);
        // Of nobody's work.
        begin("c.tmp").finish(|| dir.rename("c.tmp".as_ref(), "c".as_ref())).unwrap();
    }
}
