//! What a byte of a file is for, and how that looks.

use crate::DType;

/// What a byte of a file is for. The format allows nothing between tensors and nothing behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Header,
    /// The spaces at a header's end, which put the data on a boundary.
    Padding,
    Tensor(DType),
}

/// How a kind looks: a letter, a color of the 256 that terminals have, and one for the web that is
/// readable on white and on black.
pub(super) struct Look {
    pub(super) letter: char,
    pub(super) terminal: u8,
    pub(super) web: &'static str,
}

impl Kind {
    /// More than there are kinds.
    pub(super) const COUNT: usize = DType::ALL.len() + 2;

    pub(super) fn index(self) -> usize {
        match self {
            Self::Header => 0,
            Self::Padding => 1,
            Self::Tensor(dtype) => 2 + dtype as usize,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Padding => "padding",
            Self::Tensor(dtype) => dtype.name(),
        }
    }

    /// The one place that says how things look. Floats have capitals, integers small letters.
    pub(super) fn look(self) -> Look {
        let (letter, terminal, web) = match self {
            Self::Header => ('#', 250, "#94a3b8"),
            Self::Padding => ('.', 240, "#64748b"),
            Self::Tensor(dtype) => match dtype {
                DType::F64 => ('D', 99, "#8b5cf6"),
                DType::F32 => ('F', 69, "#3b82f6"),
                DType::F16 => ('H', 35, "#16a34a"),
                DType::BF16 => ('B', 208, "#f97316"),
                DType::C64 => ('C', 135, "#a855f7"),
                DType::F8E4M3 => ('E', 205, "#ec4899"),
                DType::F8E5M2 => ('M', 203, "#f43f5e"),
                DType::F8E8M0 => ('X', 171, "#d946ef"),
                DType::F8E4M3Fnuz => ('N', 162, "#db2777"),
                DType::F8E5M2Fnuz => ('Z', 161, "#e11d48"),
                DType::F6E2M3 => ('S', 178, "#ca8a04"),
                DType::F6E3M2 => ('T', 136, "#a16207"),
                DType::F4 => ('Q', 220, "#eab308"),
                DType::I64 => ('l', 32, "#0284c7"),
                DType::I32 => ('i', 39, "#0ea5e9"),
                DType::I16 => ('s', 44, "#06b6d4"),
                DType::I8 => ('b', 37, "#14b8a6"),
                DType::U64 => ('x', 64, "#4d7c0f"),
                DType::U32 => ('w', 70, "#65a30d"),
                DType::U16 => ('v', 106, "#84a50d"),
                DType::U8 => ('u', 112, "#84cc16"),
                DType::Bool => ('t', 130, "#b45309"),
            },
        };
        Look { letter, terminal, web }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_kinds_look_alike() {
        let kinds: Vec<Kind> = [Kind::Header, Kind::Padding]
            .into_iter()
            .chain(DType::ALL.iter().map(|&dtype| Kind::Tensor(dtype)))
            .collect();
        let count = |of: &dyn Fn(&Kind) -> String| kinds.iter().map(of).collect::<HashSet<_>>().len();
        assert_eq!(count(&|kind| kind.look().letter.to_string()), Kind::COUNT);
        assert_eq!(count(&|kind| kind.look().terminal.to_string()), Kind::COUNT);
        assert_eq!(count(&|kind| kind.look().web.to_owned()), Kind::COUNT);
        assert_eq!(count(&|kind| kind.index().to_string()), Kind::COUNT);
        assert!(kinds.iter().all(|kind| kind.index() < Kind::COUNT));
    }
}
