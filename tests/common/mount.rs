//! File systems of a test's own.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A file system of its own in a loop-mounted file; gone when dropped.
pub struct Mount {
    root: tempfile::TempDir,
}

impl Mount {
    /// `None`, loudly, where this machine cannot make one.
    #[track_caller]
    pub fn new(test: &str, mkfs: &[&str], size: u64) -> Option<Self> {
        if !super::is_root() {
            super::skip(test, "mounting a file system needs root");
            return None;
        }
        let root = super::disk_dir();
        let image = root.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(size).unwrap();
        std::fs::create_dir(root.path().join("mnt")).unwrap();
        let run = |command: &mut Command| {
            let output = command.stdin(Stdio::null()).output();
            output.map_err(|e| e.to_string()).and_then(|out| {
                if out.status.success() {
                    Ok(())
                } else {
                    Err(String::from_utf8_lossy(&out.stderr).into_owned())
                }
            })
        };
        let made = run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image)).and_then(|()| {
            run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(root.path().join("mnt")))
        });
        if let Err(why) = made {
            super::skip(test, format!("{mkfs:?}: {why}"));
            return None;
        }
        Some(Self { root })
    }

    /// So much memory; `None`, loudly, as above.
    #[track_caller]
    pub fn memory(test: &str, size: u64) -> Option<Self> {
        if !super::is_root() {
            super::skip(test, "mounting a file system needs root");
            return None;
        }
        let root = super::disk_dir();
        let mount = Self { root };
        std::fs::create_dir(mount.path()).unwrap();
        let size = format!("size={size}");
        let made =
            Command::new("mount").args(["-t", "tmpfs", "tmpfs", "-o", &size]).arg(mount.path()).output();
        if made.as_ref().is_ok_and(|made| made.status.success()) {
            return Some(mount);
        }
        super::skip(test, format!("mounting memory: {made:?}"));
        // Nothing to unmount.
        let Self { root } = &mount;
        std::fs::remove_dir_all(root.path()).unwrap();
        std::mem::forget(mount);
        None
    }

    pub fn path(&self) -> PathBuf {
        self.root.path().join("mnt")
    }

    /// What has reached the disk by now, as another file system: what there is after a power loss. `None` as above.
    #[track_caller]
    pub fn after_power_loss(&self, test: &str) -> Option<Self> {
        let root = super::disk_dir();
        let (image, mnt) = (root.path().join("image"), root.path().join("mnt"));
        std::fs::create_dir(&mnt).unwrap();
        let copied = Command::new("cp")
            .arg("--sparse=always")
            .arg(self.root.path().join("image"))
            .arg(&image)
            .status()
            .unwrap();
        assert!(copied.success());
        // XFS and Btrfs mount no file system twice by its identity.
        let options = ["loop,nouuid", "loop"];
        let mounted = options.iter().any(|options| {
            let command = Command::new("mount").args(["-o", options]).arg(&image).arg(&mnt).output();
            command.is_ok_and(|output| output.status.success())
        });
        if mounted {
            return Some(Self { root });
        }
        super::skip(test, "what is on the disk cannot be mounted");
        None
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmount = |flags: &[&str]| {
            Command::new("umount").args(flags).arg(self.path()).status().is_ok_and(|status| status.success())
        };
        assert!(unmount(&[]) || unmount(&["-l"]) || std::thread::panicking(), "umount");
    }
}
