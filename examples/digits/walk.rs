//! The walk: open, use, edit, save. What it prints it has measured; what it claims it checks.

use maptensors::{Mapping, Model, ModelMut, Residency};
use std::error::Error;
use std::fmt::Display;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

// How the model is fine-tuned: plain SGD, batches in the order of the file.
const EPOCHS: usize = 20;
const BATCH: usize = 20;
const RATE: f32 = 0.1;

/// Takes the walk over `digits.safetensors` and `digits-heldout.safetensors` in `models`, and saves the
/// fine-tuned model as `tuned`.
///
/// # Errors
/// Whatever the crate returns, and a sentence for any claim that does not hold.
#[allow(unsafe_code)]
pub fn walk(out: &mut impl Write, models: &Path, tuned: &Path) -> Result<()> {
    let path = models.join("digits.safetensors");
    let before = fs::read(&path)?;
    writeln!(out, "A small model that reads handwritten digits: opened, used, edited, saved.")?;
    writeln!(out, "Every number below was measured just now.")?;

    step(out, 1, "Open digits.safetensors: its header is read, its data only mapped")?;
    let start = Instant::now();
    // SAFETY: nobody writes to the file while it is mapped: it is part of this demo, which only reads it.
    let model = unsafe { Model::open(&path)? };
    let micros = start.elapsed().as_micros();
    let mapped: usize = (0..model.shards()).filter_map(|i| model.mapping(i)).map(Mapping::len).sum();
    let pages = model.residency()?;
    row(out, "mapped", &mapped, "bytes")?;
    row(out, "time taken", &micros, "µs")?;
    touched(out, pages)?;
    claim(pages.touched == 0, "opening touches no data page")?;

    step(out, 2, "Use it: the weights are read where they lie in the file")?;
    // SAFETY: as above.
    let examples = unsafe { Model::open(models.join("digits-heldout.safetensors"))? };
    let (held_out, shifted, shifted_held_out) = (
        Examples::of(&examples, "")?,
        Examples::of(&examples, "shifted.")?,
        Examples::of(&examples, "shifted.heldout.")?,
    );
    let right = count_right(&model, held_out)?;
    accuracy(out, "images it never saw: right", right, held_out)?;
    touched(out, model.residency()?)?;

    step(out, 3, "Edit it: learn images moved one pixel to the right, copy-on-write")?;
    let confused = count_right(&model, shifted_held_out)?;
    accuracy(out, "moved images, before: right", confused, shifted_held_out)?;
    // SAFETY: as above.
    let mut edited = unsafe { ModelMut::open(&path)? };
    let start = Instant::now();
    fine_tune(&mut edited, shifted)?;
    let millis = start.elapsed().as_millis();
    let learned = count_right(&edited, shifted_held_out)?;
    row(out, "fine-tuning, time taken", &millis, "ms")?;
    accuracy(out, "moved images, after: right", learned, shifted_held_out)?;
    let forgot = count_right(&edited, held_out)?;
    accuracy(out, "unmoved images, after (the price): right", forgot, held_out)?;
    let pages = edited.residency()?;
    row(out, "pages now private, copied as written", &pages.private, &of(pages.pages, "pages"))?;
    let after = fs::read(&path)?;
    row(out, "the file before, FNV-1a", &format!("{:016x}", fnv1a(&before)), "")?;
    row(out, "the file after, FNV-1a", &format!("{:016x}", fnv1a(&after)), "")?;
    claim(learned > confused, "fine-tuning helps")?;
    claim(pages.private > 0, "edits are private pages")?;
    claim(before == after, "editing leaves the file as it was")?;
    claim(count_right(&model, held_out)? == right, "another mapping of the file sees no edit")?;

    step(out, 4, "Save it: written through a mapping of the new file, then renamed")?;
    let start = Instant::now();
    edited.save(tuned)?;
    let micros = start.elapsed().as_micros();
    // SAFETY: as above; the save is done, and nobody else knows of the file.
    let reopened = unsafe { Model::open(tuned)? };
    row(out, "saved", &fs::metadata(tuned)?.len(), "bytes")?;
    row(out, "time taken, synced to disk", &micros, "µs")?;
    let aligned = |model: &Model| model.tensors().filter(|t| t.info().alignment() >= 64).count();
    let tensors = of(model.len(), "tensors");
    row(out, "on 64-byte boundaries in the old file", &aligned(&model), &tensors)?;
    row(out, "on 64-byte boundaries in the new file", &aligned(&reopened), &tensors)?;
    let same = edited.tensors().filter(|t| bits(&reopened, t.name()) == Some(t.as_bytes())).count();
    row(out, "reopened: the same, bit for bit", &same, &tensors)?;
    let right = count_right(&reopened, shifted_held_out)?;
    accuracy(out, "reopened: moved images right", right, shifted_held_out)?;
    claim(same == edited.len() && reopened.len() == edited.len(), "what is saved is what was edited")?;
    claim(right == learned, "a model reopened answers as it did before")?;

    writeln!(out, "\nNext")?;
    writeln!(out, "   maptensors inspect PATH              what is in a model of your own")?;
    writeln!(out, "   import maptensors as mt              the same from Python: mt.open(PATH)")?;
    writeln!(out, "   cargo add maptensors                 from Rust: Model::open(path)")?;
    writeln!(out, "   examples/digits/walk.rs              this walk, to read and change")?;
    Ok(())
}

/// Images of 64 pixels, 0 to 16, one after the other, and which digit each shows.
#[derive(Clone, Copy)]
struct Examples<'a> {
    images: &'a [u8],
    labels: &'a [u8],
}

impl<'a> Examples<'a> {
    fn of(model: &'a Model, which: &str) -> Result<Self> {
        Ok(Self {
            images: model.tensor(&format!("{which}images"))?.as_slice()?,
            labels: model.tensor(&format!("{which}labels"))?.as_slice()?,
        })
    }

    /// Each image as the network takes it, with its digit.
    fn iter(self) -> impl Iterator<Item = (Vec<f32>, usize)> {
        let pixels = self.images.chunks_exact(64);
        let inputs = pixels.map(|image| image.iter().map(|&pixel| f32::from(pixel) / 16.0).collect());
        inputs.zip(self.labels.iter().map(|&label| label.into()))
    }
}

/// The network, 64 to 64 (`ReLU`) to 10: slices that point into a mapping.
struct Net<'a> {
    w1: &'a [f32],
    b1: &'a [f32],
    w2: &'a [f32],
    b2: &'a [f32],
}

/// The network's tensors, in the order of its gradients.
const TENSORS: [&str; 4] = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"];

impl<'a> Net<'a> {
    fn of(model: &'a Model) -> Result<Self> {
        let [w1, b1, w2, b2] = TENSORS.map(|name| model.tensor(name)?.as_slice::<f32>());
        Ok(Self { w1: w1?, b1: b1?, w2: w2?, b2: b2? })
    }

    /// The hidden layer and the ten scores for one image.
    fn forward(&self, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut hidden = linear(self.w1, self.b1, x);
        for h in &mut hidden {
            *h = h.max(0.0);
        }
        let scores = linear(self.w2, self.b2, &hidden);
        (hidden, scores)
    }

    /// How the mean cross-entropy of a batch changes with each number of each tensor.
    fn gradients(&self, batch: &[(Vec<f32>, usize)]) -> [Vec<f32>; 4] {
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        let [mut w1, mut b1, mut w2, mut b2] = [self.w1, self.b1, self.w2, self.b2].map(zeros);
        let share = batch.iter().map(|_| 1.0f32).sum::<f32>().recip();
        for (x, label) in batch {
            let (hidden, scores) = self.forward(x);
            let mut d_scores = softmax(&scores);
            d_scores[*label] -= 1.0;
            for d in &mut d_scores {
                *d *= share;
            }
            // Back through the second layer, and through the ReLU where it let something pass.
            let mut d_hidden = vec![0.0; hidden.len()];
            for (d, weights) in d_scores.iter().zip(self.w2.chunks_exact(hidden.len())) {
                add_scaled(&mut d_hidden, *d, weights);
            }
            for (d, _) in d_hidden.iter_mut().zip(&hidden).filter(|(_, h)| **h <= 0.0) {
                *d = 0.0;
            }
            add_outer(&mut w1, &mut b1, &d_hidden, x);
            add_outer(&mut w2, &mut b2, &d_scores, &hidden);
        }
        [w1, b1, w2, b2]
    }
}

/// How many of the examples the model names rightly.
fn count_right(model: &Model, examples: Examples) -> Result<usize> {
    let net = Net::of(model)?;
    let named = |x: &[f32]| {
        let (_, scores) = net.forward(x);
        scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(digit, _)| digit)
    };
    Ok(examples.iter().filter(|(x, label)| named(x) == Some(*label)).count())
}

/// Every step writes straight into the mapped tensors; the kernel copies a page at its first write.
fn fine_tune(model: &mut ModelMut, examples: Examples) -> Result<()> {
    let examples: Vec<_> = examples.iter().collect();
    for batch in (0..EPOCHS).flat_map(|_| examples.chunks(BATCH)) {
        let gradients = Net::of(model)?.gradients(batch);
        for (name, gradient) in TENSORS.iter().zip(&gradients) {
            add_scaled(model.tensor_mut(name)?.as_mut_slice()?, -RATE, gradient);
        }
    }
    Ok(())
}

/// `weights · x + bias`; weights are `[out, in]`.
fn linear(weights: &[f32], bias: &[f32], x: &[f32]) -> Vec<f32> {
    let rows = weights.chunks_exact(x.len());
    rows.zip(bias).map(|(row, b)| b + row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>()).collect()
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let largest = scores.iter().copied().fold(f32::MIN, f32::max);
    let odds: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f32 = odds.iter().sum();
    odds.into_iter().map(|o| o / sum).collect()
}

/// `to += scale * from`.
fn add_scaled(to: &mut [f32], scale: f32, from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += scale * from;
    }
}

/// A linear layer's gradients: `weights += d ⊗ x`, `bias += d`.
fn add_outer(weights: &mut [f32], bias: &mut [f32], d: &[f32], x: &[f32]) {
    for (row, d) in weights.chunks_exact_mut(x.len()).zip(d) {
        add_scaled(row, *d, x);
    }
    add_scaled(bias, 1.0, d);
}

fn bits<'a>(model: &'a Model, name: &str) -> Option<&'a [u8]> {
    model.tensor(name).ok().map(|tensor| tensor.as_bytes())
}

/// A fingerprint to look at; that files are equal is checked byte by byte.
fn fnv1a(bytes: &[u8]) -> u64 {
    let hash = |hash: u64, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, hash)
}

fn claim(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(format!("the demo claims that {what}; here this is not so").into()) }
}

fn step(out: &mut impl Write, number: usize, title: &str) -> Result<()> {
    Ok(writeln!(out, "\n{number}  {title}")?)
}

fn row(out: &mut impl Write, label: &str, value: &dyn Display, unit: &str) -> Result<()> {
    Ok(writeln!(out, "{}", format!("   {label:<42}{value:>16} {unit}").trim_end())?)
}

fn accuracy(out: &mut impl Write, label: &str, right: usize, examples: Examples) -> Result<()> {
    let hundredths = right * 10_000 / examples.labels.len().max(1);
    let percent = format!("{}.{:02}", hundredths / 100, hundredths % 100);
    row(out, label, &percent, &format!("% ({right} of {})", examples.labels.len()))
}

fn touched(out: &mut impl Write, pages: Residency) -> Result<()> {
    row(out, "data pages touched", &pages.touched, &of(pages.pages, "pages"))
}

fn of(all: usize, what: &str) -> String {
    format!("of {all} {what}")
}
