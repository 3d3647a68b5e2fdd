//! Opens a small classifier of handwritten digits, uses it, fine-tunes it in copy-on-write memory and saves
//! the result, measuring each step: `cargo run --release --example digits`.

mod walk;

use std::error::Error;
use std::io;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let dir = tempfile::tempdir()?;
    walk::walk(&mut io::stdout().lock(), &models, &dir.path().join("digits-tuned.safetensors"))
}
