//! What is smallest whole of a dtype.

use std::fmt;

/// The elements that belong together, and the bytes that they take: one element for most dtypes, two 4-bit floats in a
/// byte, 256 quantised weights in 144 bytes. A tensor is a whole number of blocks.
///
/// ```
/// use maptensors::{Block, DType};
///
/// let block = DType::F6E2M3.block();
/// assert_eq!(block, Block { elements: 4, bytes: 3 });
/// assert_eq!((block.nbytes(8), block.nbytes(6)), (Some(6), None));
/// assert_eq!(block.to_string(), "4 elements in 3 bytes");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Block {
    /// Elements of a block; never 0.
    pub elements: usize,
    /// Bytes of a block; never 0.
    pub bytes: usize,
}

impl Block {
    /// Bytes that `elements` elements take, or `None` where they are no whole number of blocks, or more bytes than
    /// memory has addresses (`isize::MAX`).
    ///
    /// ```
    /// assert_eq!(maptensors::DType::F4.block().nbytes(3), None);
    /// ```
    pub const fn nbytes(self, elements: usize) -> Option<usize> {
        // The plain dtypes need no division: opening asks once for each tensor.
        let blocks = if self.elements == 1 { Some(elements) } else { elements.checked_div(self.elements) };
        let Some(blocks) = blocks else { return None };
        match blocks.checked_mul(self.bytes) {
            Some(bytes) if self.is_whole(elements) && bytes <= isize::MAX.cast_unsigned() => Some(bytes),
            _ => None,
        }
    }

    /// Whether `elements` elements are a whole number of blocks.
    ///
    /// ```
    /// assert!(maptensors::DType::F4.block().is_whole(4));
    /// ```
    pub const fn is_whole(self, elements: usize) -> bool {
        self.elements == 1 || elements.is_multiple_of(self.elements)
    }

    /// Where the block with this element starts, in bytes from the first element's. The element lies inside a tensor,
    /// so this does not overflow.
    pub(crate) const fn start_of(self, element: usize) -> usize {
        element / self.elements * self.bytes
    }

    /// As [`Block::start_of`], also before the first element, of one that starts a block.
    pub(crate) const fn start_of_signed(self, element: isize) -> isize {
        element / self.elements.cast_signed() * self.bytes.cast_signed()
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        let Self { elements, bytes } = *self;
        write!(f, "{elements} element{} in {bytes} byte{}", plural(elements), plural(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Block = Block { elements: 1, bytes: 4 };
    const SUPER: Block = Block { elements: 256, bytes: 144 };

    #[test]
    fn only_whole_blocks_have_a_size_and_overflow_is_none() {
        for (block, elements, bytes) in [
            (PLAIN, 0, Some(0)),
            (PLAIN, 3, Some(12)),
            (PLAIN, usize::MAX, None),
            (SUPER, 0, Some(0)),
            (SUPER, 256, Some(144)),
            (SUPER, 255, None),
            (SUPER, 257, None),
            (PLAIN, usize::MAX / 8, Some(usize::MAX / 8 * 4)),
            (PLAIN, usize::MAX / 8 + 1, None),
            (SUPER, usize::MAX / 4 + 1, Some((usize::MAX / 4 + 1) / 256 * 144)),
            (SUPER, usize::MAX - 255, None),
            (Block { elements: 2, bytes: 34 }, usize::MAX - 1, None),
        ] {
            assert_eq!(block.nbytes(elements), bytes, "{block}, {elements} of them");
        }
    }

    #[test]
    fn every_element_of_a_block_is_found_at_its_start() {
        for (element, start) in [(0, 0), (255, 0), (256, 144), (1000, 432)] {
            assert_eq!(SUPER.start_of(element), start);
        }
        assert_eq!(PLAIN.start_of(7), 28);
    }
}
