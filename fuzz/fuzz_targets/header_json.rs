//! Files whose headers are almost right, so that the checks behind the JSON are reached.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::fmt::Write as _;

#[path = "../../tests/common/oracle.rs"]
mod oracle;

#[derive(Arbitrary, Debug)]
struct File {
    metadata: Option<Vec<(Name, Name)>>,
    tensors: Vec<Tensor>,
    /// Spaces behind the header, so that its length takes every remainder.
    padding: u8,
    /// Bytes more or fewer than the tensors take.
    excess: Option<i8>,
    /// Cut or flipped bytes.
    damage: Option<(u16, u8)>,
}

#[derive(Arbitrary, Debug)]
struct Tensor {
    name: Name,
    dtype: u8,
    shape: Vec<Dim>,
    /// Offsets other than where the last tensor ended.
    misplaced: Option<(Dim, Dim)>,
    /// The order of the fields, and oddities among them.
    form: u8,
}

#[derive(Arbitrary, Debug)]
enum Name {
    Letter(u8),
    Escaped(u8),
    Any(String),
    Metadata,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Dim {
    Small(u8),
    Power(u8),
    Any(u64),
}

impl Name {
    fn json(&self) -> String {
        match self {
            Self::Letter(n) => format!("\"{}\"", char::from(b'a' + n % 4)),
            Self::Escaped(n) => format!("\"\\u{:04x}\"", b'a' + n % 4),
            Self::Any(text) => serde_json::to_string(text).unwrap(),
            Self::Metadata => "\"__metadata__\"".into(),
        }
    }
}

impl Dim {
    fn value(self) -> u64 {
        match self {
            Self::Small(n) => u64::from(n % 9),
            Self::Power(n) => 1 << (n % 64),
            Self::Any(n) => n,
        }
    }
}

impl File {
    fn bytes(&self) -> Vec<u8> {
        let mut header = String::from("{");
        if let Some(metadata) = &self.metadata {
            let pairs: Vec<_> = metadata.iter().map(|(k, v)| format!("{}:{}", k.json(), v.json())).collect();
            let _ = write!(header, "\"__metadata__\":{{{}}}", pairs.join(","));
        }
        let mut end = 0u64;
        for tensor in &self.tensors {
            if header.len() > 1 {
                header.push(',');
            }
            let dtype = maptensors::DType::ALL[usize::from(tensor.dtype) % maptensors::DType::ALL.len()];
            let shape: Vec<u64> = tensor.shape.iter().map(|dim| dim.value()).collect();
            let block = dtype.block();
            let bits = (block.bytes * 8 / block.elements) as u64;
            let bits = shape.iter().fold(bits, |n, &dim| n.saturating_mul(dim));
            let next = end.saturating_add(bits / 8);
            let (begin, stop) = tensor.misplaced.map_or((end, next), |(b, e)| (b.value(), e.value()));
            end = if next < 1 << 16 { next } else { end };
            let dtype = format!("\"dtype\":\"{}\"", dtype.name());
            let shape = format!("\"shape\":{shape:?}");
            let offsets = format!("\"data_offsets\":[{begin},{stop}]");
            let entry = match tensor.form % 16 {
                0 => format!("{{{shape},{dtype},{offsets}}}"),
                1 => format!("{{{offsets},{shape},{dtype}}}"),
                2 => format!("{{{dtype},{shape},{offsets},\"x\":{{\"y\":[1.5,null]}}}}"),
                3 => format!("{{{dtype},{dtype},{shape},{offsets}}}"),
                4 => format!("{{ {dtype} , {shape}\n,\t{offsets} }}"),
                5 => format!("{{{dtype},{shape}}}"),
                _ => format!("{{{dtype},{shape},{offsets}}}"),
            };
            let _ = write!(header, "{}:{entry}", tensor.name.json());
        }
        header.push('}');
        header.extend(std::iter::repeat_n(' ', usize::from(self.padding % 65)));
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        let data = end.saturating_add_signed(i64::from(self.excess.unwrap_or(0)));
        file.extend((0..data.min(1 << 20)).map(|i| (i % 251) as u8));
        if let Some((at, with)) = self.damage {
            let at = usize::from(at) % file.len();
            file[at] ^= with;
        }
        file
    }
}

fuzz_target!(|file: File| {
    oracle::compare(&file.bytes());
});
