//! Outside of what torch may put between a tensor and its bytes.

use pyo3::intern;
use pyo3::prelude::*;

/// While this lives, torch calls of this thread reach the tensors' own memory: no dispatch mode (fake, functional,
/// a user's), no function mode (`torch.device("meta")`), no transform (`vmap`, `grad`), no `__torch_function__` and no
/// `__torch_dispatch__` of a subclass is asked.
pub(in crate::python) struct OutOfModes<'py> {
    entered: Vec<Bound<'py, PyAny>>,
}

impl<'py> OutOfModes<'py> {
    /// As [`OutOfModes::enter`], where there is anything of torch.
    pub(super) fn enter_if(
        py: Python<'py>,
        wanted: impl FnOnce() -> PyResult<bool>,
    ) -> PyResult<Option<Self>> {
        Ok(if wanted()? { Some(Self::enter(py)?) } else { None })
    }

    /// # Errors
    /// Of a torch that cannot leave its modes.
    pub(super) fn enter(py: Python<'py>) -> PyResult<Self> {
        let c = py.import(intern!(py, "torch._C"))?;
        let mut modes = Self { entered: Vec::with_capacity(3) };
        for guard in [
            intern!(py, "DisableTorchFunction"),
            intern!(py, "_DisableTorchDispatch"),
            intern!(py, "_DisableFuncTorch"),
        ] {
            let guard = c.getattr(guard)?.call0()?;
            guard.call_method0(intern!(py, "__enter__"))?;
            modes.entered.push(guard);
        }
        Ok(modes)
    }
}

impl Drop for OutOfModes<'_> {
    fn drop(&mut self) {
        while let Some(guard) = self.entered.pop() {
            let py = guard.py();
            let none = py.None();
            let left = guard.call_method1(intern!(py, "__exit__"), (&none, &none, &none));
            if let Err(error) = left {
                error.write_unraisable(py, Some(&guard));
            }
        }
    }
}
