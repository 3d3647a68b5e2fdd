//! What a file is that is no format we read: one table of signatures, each with what to do.

/// What a file that starts like this probably is, and what to do; `None` for what is not known.
pub(crate) fn hint(head: &[u8]) -> Option<&'static str> {
    SIGNS.iter().find(|(is_sign, _)| is_sign(head)).map(|&(_, hint)| hint)
}

type Sign = fn(&[u8]) -> bool;

/// The first that fits counts.
const SIGNS: &[(Sign, &str)] = &[
    (
        |head| head.starts_with(b"version https://git-lfs") || head == b"version ",
        "this is a Git LFS pointer, not the weights: run `git lfs pull`",
    ),
    (
        is_torch_zip,
        "this is a PyTorch checkpoint (a zip archive of a pickle), which is not read: load it with torch",
    ),
    (is_npz, "this is an npz archive (a zip of numpy arrays), which is not read: load it with numpy"),
    (is_zip, "this is a zip archive, perhaps a PyTorch checkpoint; it is not loaded as one"),
    (
        |head| head.starts_with(b"\x93NUMPY"),
        "this is a numpy array file (npy), which is not read: load it with numpy",
    ),
    (is_pickle, "this is a Python pickle; it is not loaded as one"),
    (|head| head.starts_with(b"GGUF"), "this is a GGUF file, which is not read yet"),
    (
        |head| head.starts_with(b"ggml") || head.starts_with(b"lmgg") || head.starts_with(b"tjgg"),
        "this is a GGML file, of before GGUF, which is not read",
    ),
    (
        |head| head.starts_with(b"\x89HDF\r\n\x1a\n"),
        "this is an HDF5 file (perhaps of Keras), which is not read: load it with h5py",
    ),
    (|head| at(head, 4, b"TFL3"), "this is a TensorFlow Lite model, which is not read"),
    (
        |head| at(head, 257, b"ustar"),
        "this is a tar archive: unpack it, or open the part that is the model (window)",
    ),
    (|head| head.starts_with(b"\x1f\x8b\x08"), "this is compressed by gzip: unpack it with gunzip"),
    (|head| head.starts_with(b"\x28\xb5\x2f\xfd"), "this is compressed by zstd: unpack it with unzstd"),
    (is_onnx, "this is an ONNX model, which is not read: load it with onnx"),
    (
        is_msgpack,
        "this is msgpack, perhaps a Flax checkpoint, which is not read: load it with flax.serialization",
    ),
    (
        |head| is_json(head) && (contains(head, b"\"weight_map\"") || contains(head, b"\"total_size\"")),
        "this is the index of a sharded model: give it its name back, which ends in .index.json, beside its shards",
    ),
    (is_json, "this is JSON, not weights; is it the index of a sharded model?"),
    (
        |head| head.starts_with(b"<") && is_text(head),
        "this is HTML or XML: an error page saved in place of the weights?",
    ),
    (is_text, "this is text, not weights"),
];

fn at(head: &[u8], place: usize, sign: &[u8]) -> bool {
    head.get(place..).is_some_and(|rest| rest.starts_with(sign))
}

fn contains(head: &[u8], text: &[u8]) -> bool {
    memchr::memmem::find(head, text).is_some()
}

fn is_zip(head: &[u8]) -> bool {
    head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06")
}

/// The name of a zip archive's first entry, as far as it is there.
fn first_entry(head: &[u8]) -> Option<&[u8]> {
    let &[low, high] = head.get(26..28)?.first_chunk()?;
    let len = usize::from(u16::from_le_bytes([low, high]));
    let name = head.get(30..)?;
    is_zip(head).then(|| &name[..len.min(name.len())])
}

/// torch's archives hold everything in a directory, and `data.pkl` or the byte order first.
fn is_torch_zip(head: &[u8]) -> bool {
    const FIRST: [&[u8]; 5] =
        [b"/data.pkl", b"/byteorder", b"/version", b"/.format_version", b"/.data/serialization_id"];
    first_entry(head).is_some_and(|name| FIRST.iter().any(|first| name.ends_with(first)))
}

fn is_npz(head: &[u8]) -> bool {
    first_entry(head).is_some_and(|name| name.ends_with(b".npy"))
}

/// Of protocol 2 and later, which say so; then comes an operation.
fn is_pickle(head: &[u8]) -> bool {
    matches!(head, [0x80, 2..=5, opcode, ..] if *opcode != 0)
}

/// A protobuf that begins with a version of the format (field 1) and then the producer's name (field 2), or with that
/// of a domain or a graph.
fn is_onnx(head: &[u8]) -> bool {
    matches!(head, [0x08, 1..=30, 0x12 | 0x1a | 0x22 | 0x2a | 0x32 | 0x3a | 0x42, ..])
}

/// A map whose first key is text.
fn is_msgpack(head: &[u8]) -> bool {
    let ([0x81..=0x8f, key @ ..] | [0xde, _, _, key @ ..] | [0xdf, _, _, _, _, key @ ..]) = head else {
        return false;
    };
    let text = match key {
        [len @ 0xa1..=0xbf, rest @ ..] => rest.get(..usize::from(len & 0x1f).min(rest.len())),
        [0xd9, len, rest @ ..] => rest.get(..usize::from(*len).min(rest.len())),
        _ => None,
    };
    text.is_some_and(|text| {
        !text.is_empty() && text.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ')
    })
}

/// The length of a header may be the byte of a brace, too.
fn is_json(head: &[u8]) -> bool {
    head.starts_with(b"{") && is_text(head)
}

fn is_text(head: &[u8]) -> bool {
    let start = &head[..head.len().min(8)];
    !start.is_empty() && start.iter().all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A zip archive's first local header, with this name.
    fn zip(name: &str) -> Vec<u8> {
        let mut bytes = b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        bytes.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(name.as_bytes());
        bytes.extend([0; 40]);
        bytes
    }

    fn tar(name: &str) -> Vec<u8> {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(257, 0);
        bytes.extend(b"ustar\0");
        bytes.resize(1024, 0);
        bytes
    }

    /// Files of each kind, and a word that their errors have.
    fn files() -> Vec<(Vec<u8>, &'static str)> {
        let plain: [(&[u8], &str); 26] = [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
            (b"PK\x03\x04\x14\0\0\0rest", "zip archive"),
            (b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "zip archive"),
            (b"\x80\x02}q\0(X\x06\0\0\0weight", "pickle"),
            (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", "pickle"),
            (b"\x80\x05\x95\x10\0\0\0\0\0\0\0}", "pickle"),
            (b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0", "GGUF"),
            (b"lmgg\x01\0\0\0\0\0\0\0", "GGML"),
            (b"\x93NUMPY\x01\0v\0{'descr': '<f4'", "numpy array"),
            (b"\x89HDF\r\n\x1a\n\0\0\0\0\0", "HDF5"),
            (b"\x1c\0\0\0TFL3\x14\0\x20\0", "TensorFlow Lite"),
            (b"\x1f\x8b\x08\x08\x12\x34\x56\x68\0\x03model.tar\0", "gzip"),
            (b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xcbH", "gzip"),
            (b"\x28\xb5\x2f\xfd\x04\x58\x09\0\0", "zstd"),
            (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0:", "ONNX"),
            (b"\x08\x0a:\xa2\x03\n\x10\n\x01x", "ONNX"),
            (b"\x81\xa6params\x82\xa7Dense_0", "msgpack"),
            (b"\xde\x00\x10\xa6layers\x82\xa7Dense_0", "msgpack"),
            (b"\x82\xd9\x21transformer/block_0/attention/key\xc7\x10\x01", "msgpack"),
            (b"{\"metadata\": {\"total_size\": 1}, \"weight_map\": {}}", "index of a sharded model: give"),
            (b"{\"weight_map\":{}}", "index of a sharded model: give"),
            (b"{\"hidden_size\": 768}", "JSON"),
            (b"<!DOCTYPE html><html>", "HTML"),
            (b"<?xml version=\"1.0\"?><Error>", "XML"),
            (b"Entry not found", "text"),
            (b"root:x:0:0:root:/", "text"),
        ];
        let mut files: Vec<_> = plain.iter().map(|&(bytes, word)| (bytes.to_vec(), word)).collect();
        for (name, word) in [
            ("archive/data.pkl", "PyTorch checkpoint (a zip"),
            ("model/.format_version", "PyTorch checkpoint (a zip"),
            ("archive/version", "PyTorch checkpoint (a zip"),
            ("arr_0.npy", "npz"),
            ("model.safetensors", "zip archive"),
            (&"x".repeat(1000), "zip archive"),
        ] {
            files.push((zip(name), word));
        }
        files.push((tar("model.safetensors"), "tar archive"));
        files.push((tar("a"), "tar archive"));
        files
    }

    #[test]
    fn every_kind_of_file_is_named_with_what_to_do() {
        for (bytes, word) in files() {
            let start = bytes[..bytes.len().min(12)].escape_ascii();
            let error = crate::format::read(&&*bytes).unwrap_err();
            assert!(error.to_string().contains(word), "{start}: {error}, expected {word}");
            let length = bytes[..8].try_into().map(u64::from_le_bytes).unwrap();
            let expected = if length > crate::format::safetensors::MAX_HEADER_LEN { "Limit" } else { "Json" };
            assert_eq!(error.kind().name(), expected, "{start}: {error}");
        }
    }

    #[test]
    fn what_is_cut_short_is_named_or_not_and_never_a_panic() {
        for (bytes, _) in files() {
            for len in 0..bytes.len().min(600) {
                let _ = hint(&bytes[..len]);
                assert!(crate::format::read(&&bytes[..len]).is_err());
            }
        }
    }

    #[test]
    fn noise_is_not_named() {
        for bytes in [&b"\xfe\xdc\xba\x98\x76\x54\x32\x10\0\0\0"[..], &[0xff; 600], &[0; 600], b""] {
            assert_eq!(hint(bytes), None);
            let error = crate::format::read(&bytes).unwrap_err();
            assert!(!error.to_string().contains("this is"), "{error}");
        }
        // A file that is only damaged is not taken for another.
        let layout = crate::Layout::builder().tensor("a", crate::DType::U8, &[1]).build().unwrap();
        let (mut header, _) = crate::format::safetensors::encode(&layout, Path::new("")).unwrap();
        header[12] = 0xff;
        assert_eq!(crate::format::read(&&*header).unwrap_err().kind().name(), "Utf8");
    }
}
