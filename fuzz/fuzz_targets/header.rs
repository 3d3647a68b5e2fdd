//! Any bytes as a file: the reference crate accepts and refuses the same, and reads the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/common/oracle.rs"]
mod oracle;

fuzz_target!(|file: &[u8]| {
    oracle::compare(file);
    // Most inputs are headers without a length field worth the name.
    let mut framed = (file.len() as u64).to_le_bytes().to_vec();
    framed.extend(file);
    oracle::compare(&framed);
});
