//! Live weights between processes: one publishes generation after generation, any number hold the current one.
//!
//! A publication is a directory, by default in memory (`/dev/shm`):
//!
//! ```text
//! control           which generation is the current one; the word that readers wait at
//! 17.safetensors    segments: each a whole safetensors file, never changed once it has its name
//! 16.safetensors
//! ```
//!
//! A generation is its head segment and older ones, newest first; a tensor lives in the first that has it. The list
//! stands in the head's metadata, as `maptensors.share`. So publishing is writing one segment with what changed,
//! giving it its name, and writing its number to the control page: one step, at whose either side a generation is
//! whole. Tensors that did not change stay the very same pages.
//!
//! # Who may be killed when
//!
//! A publisher that dies before the flip leaves a segment that no generation lists: the next publisher
//! removes it. After the flip, one that is listed no more: likewise. Between the flip and the wake: who waits
//! looks by itself four times a second. Its lock on the control page dies with it. A reader that dies closes its
//! files, and that is all that ever held them.
//!
//! # What is used again
//!
//! A segment that is listed no more is written anew only if it has been given another name and a write lease (fcntl(2))
//! is granted: nobody, in any process, has it open or mapped. (Where a file system is laid over another the kernel
//! does not see all mappings: there no lease is asked for, and no file used again.) Else it is removed, and the kernel keeps it as
//! long as a reader does. Who had looked it up by its old name, and opens it late, finds another number
//! in it and looks at the control page again.
//!
//! # What is left behind
//!
//! A publication stays when its publisher ends, however it ends: a reader may hold it, and the next publisher goes on.
//! [`Publication`] finds those that have a name, says what they take and whether anybody publishes there, without a
//! lock of its own, and removes what nobody publishes any more.
//!
//! # Dead bytes
//!
//! What becomes of tensors' old bytes in segments that other tensors live in is in `plan.rs`.
//!
//! # What is not promised
//!
//! A publication lives as long as the machine is up: nothing is synced. Readers trust publishers with the
//! stable-file contract of [`crate::map`], and nothing else: the control page and the segments' headers are parsed
//! as what a stranger may have written.

mod claim;
mod compare;
mod control;
mod place;
mod plan;
mod publication;
mod publisher;
mod room;
mod segment;
mod store;
mod subscriber;
#[cfg(test)]
mod tests;
mod user;
mod write;

#[cfg(feature = "python")]
pub(crate) use compare::Candidate;
pub use publication::Publication;
pub use publisher::{PublishOptions, Publisher};
pub use subscriber::{AttachOptions, Refreshed, Subscriber};
