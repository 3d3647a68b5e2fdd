//! A publication that does not fit.

use crate::error::Error;
use rustix::io::Errno;
use std::path::Path;

/// For `map_err`: where `needed` bytes had no room in a file at `path`, says how much there is, and what to do. The error
/// stays the operating system's.
pub(super) fn told(path: &Path, needed: u64) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Io { path: file, source, .. }
            if [Errno::NOSPC, Errno::DQUOT]
                .map(|errno| Some(errno.raw_os_error()))
                .contains(&source.raw_os_error()) =>
        {
            let action = action(path.parent().unwrap_or(path), needed);
            Error::Io { path: file, action: action.into(), source }
        }
        error => error,
    }
}

fn action(dir: &Path, needed: u64) -> String {
    let free = rustix::fs::statvfs(dir).map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    let free = free.map_or_else(|_| "less".into(), |free| format!("{free} bytes"));
    format!(
        "making room for {needed} bytes, where {free} are free (`maptensors publications` shows what takes \
         memory, and `--remove` frees it; /dev/shm is made larger by `mount -o remount,size=`, or in a container by \
         `--shm-size`; or publish to a path on another file system)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_keeps_the_systems_error_and_others_are_let_be() {
        let path = Path::new("/dev/shm/p/3.safetensors");
        let told = |errno: Errno| told(path, 12_345)(Error::io(path, "allocating")(errno.into()));
        for errno in [Errno::NOSPC, Errno::DQUOT] {
            let Error::Io { action, source, path: found } = told(errno) else { panic!("{errno}") };
            assert_eq!((source.raw_os_error(), &*found), (Some(errno.raw_os_error()), path));
            assert!(
                action.starts_with("making room for 12345 bytes") && action.contains("--remove"),
                "{action}"
            );
        }
        assert!(matches!(told(Errno::ACCESS), Error::Io { action, .. } if action == "allocating"));
        assert_eq!(super::told(path, 1)(Error::Argument("x".into())).to_string(), "x");
    }
}
