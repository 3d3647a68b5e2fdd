//! The kinds of errors, to match on.

use std::fmt;

macro_rules! kinds {
    ($( $(#[$doc:meta])* $kind:ident; )*) => {
        /// What kind of [`Error`](crate::Error) it is: to match on, to count, to compare. Kinds may be added.
        ///
        /// Python's classes in `maptensors.errors` have a `kind` of the same name.
        ///
        /// ```
        /// use maptensors::{ErrorKind, Model};
        ///
        /// let model = Model::read("models/digits.safetensors")?;
        /// let kind = model.tensor("fc1.wieght").unwrap_err().kind();
        /// assert_eq!((kind, kind.name()), (ErrorKind::Missing, "Missing"));
        /// # Ok::<(), maptensors::Error>(())
        /// ```
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[non_exhaustive]
        pub enum ErrorKind { $( $(#[$doc])* $kind, )* }

        impl ErrorKind {
            /// Every kind, in the order of the enum.
            ///
            /// ```
            /// assert!(maptensors::ErrorKind::ALL.contains(&maptensors::ErrorKind::Busy));
            /// ```
            pub const ALL: &'static [Self] = &[ $( Self::$kind, )* ];

            /// The kind's name, which is the name of its variant of [`Error`](crate::Error).
            ///
            /// ```
            /// assert_eq!(maptensors::ErrorKind::DType.name(), "DType");
            /// ```
            pub const fn name(self) -> &'static str {
                match self { $( Self::$kind => stringify!($kind), )* }
            }
        }
    };
}

kinds! {
    /// The operating system refused.
    Io;
    /// The path is a directory, FIFO, device or socket.
    NotRegular;
    /// The file ends before what its header declares.
    Truncated;
    /// A number is larger than any sound file has, or than this process may have.
    Limit;
    /// The header is not UTF-8.
    Utf8;
    /// The header or index is not the JSON it should be.
    Json;
    /// A name is there twice.
    Duplicate;
    /// A dtype is unknown, or not the one asked for.
    DType;
    /// A shape describes more bytes than can be counted.
    Overflow;
    /// Tensor data overlaps, leaves a hole, runs backwards, or does not fill the file.
    Layout;
    /// A byte range does not have the length that shape and dtype ask for.
    Shape;
    /// An address, or a sub-byte boundary, is not where a typed view needs it.
    Align;
    /// A bit pattern that is no value of the type: a `bool` that is neither 0 nor 1.
    Value;
    /// A shard that an index names is not in the index's directory, or below it.
    Path;
    /// There is no such tensor.
    Missing;
    /// An argument cannot be used.
    Argument;
    /// Somebody else has it, and only one can.
    Busy;
    /// A publication is not there yet, is gone, or is damaged.
    Publication;
    /// Content is not what its checksum says.
    Checksum;
    /// A delta is applied to a model that it was not made against.
    Base;
    /// A file is no delta, or one that contradicts itself.
    Delta;
    /// A file is not as it was when it was opened under a guard.
    Changed;
    /// A directory is not where it was opened any more: it was moved or removed, or a link on the way to it points
    /// elsewhere.
    Moved;
    /// What was saved is in place and visible; but something that was to go is still there.
    NotRemoved;
    /// The new file is in place and visible, but the directory could not be synced:
    /// after a power loss the old file may be back.
    NotDurable;
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
