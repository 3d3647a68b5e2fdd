//! What is done with the words of a control page, apart from how they are reached: the page itself reaches them through
//! its file, and `interleavings.rs` through memory in which every order of the threads is tried.

use std::io;
use std::time::Duration;

pub(super) const MAGIC: [u8; 8] = *b"mtshare1";
pub(super) const GENERATION: usize = 8;
pub(super) const CLOSED: usize = 32;
pub(super) const WRITER: usize = 40;
pub(super) const END: usize = 48;

/// Reads that do not fit their check, before the page counts as damaged.
const TRIES: u32 = 1000;

/// The words of a control page.
pub(super) trait Words {
    /// Reads them from the start on, and returns how many bytes there are. Each word is whole. Not all of them need be
    /// of one moment.
    fn load(&self, page: &mut [u8; END]) -> io::Result<usize>;

    /// Writes some of them.
    fn store(&self, at: usize, bytes: &[u8]) -> io::Result<()>;

    /// Whether the page has lost its name.
    fn is_removed(&self) -> io::Result<bool>;

    /// Sleeps until the next [`Words::wake`], or about so long; not at all if the generation's low half is another than
    /// this. Nothing comes between the look at it and the sleep.
    fn sleep(&self, low: u32, most: Duration);

    /// Wakes all who sleep.
    fn wake(&self);

    /// Lets others go on, before it is read again.
    fn pause();
}

/// What the control page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct State {
    /// 0: there is none yet.
    pub(crate) generation: u64,
    /// The segment that lists the others.
    pub(crate) head: u64,
    /// The publication is over: closed, or its control page has been removed.
    pub(crate) closed: bool,
    /// Who publishes, or did last.
    pub(crate) writer: u64,
}

/// What it says; `None` if that makes no sense.
pub(super) fn read<W: Words>(words: &W) -> io::Result<Option<State>> {
    for _ in 0..TRIES {
        let mut page = [0; END];
        match words.load(&mut page)? {
            END if page[..GENERATION] == MAGIC => {}
            _ => return Ok(None),
        }
        let word = |at: usize| page[at..].first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
        let (generation, head) = (word(GENERATION), word(GENERATION + 8));
        if page[GENERATION..CLOSED] == record(generation, head) {
            let closed = words.is_removed()? || word(CLOSED) != 0;
            return Ok(Some(State { generation, head, closed, writer: word(WRITER) }));
        }
        W::pause();
    }
    Ok(None)
}

/// Makes a generation the current one, and wakes who waits for it.
pub(super) fn flip(words: &impl Words, generation: u64, head: u64) -> io::Result<()> {
    words.store(GENERATION, &record(generation, head))?;
    words.wake();
    Ok(())
}

/// Says that there will be no more generations. Who looked before it and sleeps after it is not woken: the generation is
/// the same. So nobody sleeps for long without another look.
pub(super) fn close(words: &impl Words) -> io::Result<()> {
    words.store(CLOSED, &1u64.to_ne_bytes())?;
    words.wake();
    Ok(())
}

/// Sleeps until the generation is another than this, or about so long.
pub(super) fn wait(words: &impl Words, generation: u64, most: Duration) {
    words.sleep(u32::try_from(generation & u64::from(u32::MAX)).unwrap_or_default(), most);
}

/// Generation, head, and what tells that they belong together.
pub(super) fn record(generation: u64, head: u64) -> [u8; CLOSED - GENERATION] {
    let check =
        generation.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ head.wrapping_add(0x6d61_7074);
    let mut record = [0; CLOSED - GENERATION];
    for (bytes, word) in record.chunks_exact_mut(8).zip([generation, head, check]) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    record
}
