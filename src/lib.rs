//! stub
mod dtype; mod error; mod format; mod layout; mod map;
pub use dtype::*; pub use error::*; pub use layout::*; pub use map::*;
