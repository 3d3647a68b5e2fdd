//! A trainer publishes its weights while two other processes use them: `cargo run --example live_weights`.
//!
//! The three share one copy of every tensor. A step changes the last layer alone, so a generation costs its bytes
//! and no more, and those who read find out within microseconds.
#![allow(unsafe_code)]

use maptensors::{AttachOptions, ModelMut, Publisher, Result};
use std::process::{Command, ExitCode};
use std::time::Duration;

const STEPS: u64 = 5;

/// Fine-tunes, and publishes every step.
fn trainer(place: &str) -> Result<()> {
    // SAFETY: nobody writes to the file while it is mapped.
    let mut model = unsafe { ModelMut::open("models/digits.safetensors")? };
    let mut publisher = Publisher::open(place)?;
    for step in 1..=STEPS {
        for bias in model.tensor_mut("fc2.bias")?.as_mut_slice::<f32>()? {
            *bias += 0.25; // what an optimizer would do
        }
        let generation = publisher.publish_model(&model)?; // copies what changed
        println!("trainer:     step {step} is generation {generation}");
        std::thread::sleep(Duration::from_millis(100));
    }
    publisher.remove() // ends the publication: whoever reads is told
}

/// Uses the latest weights, until there are no more.
fn inference(place: &str, who: &str) -> Result<()> {
    let options = AttachOptions::new().wait(Duration::from_secs(60));
    // SAFETY: only publishers write to the publication's files.
    let mut weights = unsafe { options.attach(place)? };
    loop {
        let model = weights.model(); // stays as it is for as long as it is held
        let bias = model.tensor("fc2.bias")?.as_slice::<f32>()?[0];
        println!("inference {who}: generation {} has bias {bias:.2}", weights.generation());
        // Asleep until there is something new. What is held stays valid when the publication is over.
        if !matches!(weights.wait(None), Ok(true)) {
            return Ok(());
        }
        if let Some(new) = weights.refresh()? {
            println!("inference {who}: {} changed", new.changed.join(", "));
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["trainer", place] => trainer(place),
        ["inference", place, who] => inference(place, who),
        _ => return all(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the three, and waits for them.
fn all() -> ExitCode {
    let place = format!("live-weights-{}", std::process::id());
    let start = |args: &[&str]| Command::new(std::env::current_exe()?).args(args).spawn();
    let started =
        [start(&["inference", &place, "A"]), start(&["inference", &place, "B"]), start(&["trainer", &place])];
    let ended = started.map(|child| child.and_then(|mut child| child.wait()));
    if ended.iter().all(|end| end.as_ref().is_ok_and(std::process::ExitStatus::success)) {
        ExitCode::SUCCESS
    } else {
        eprintln!("{ended:?}");
        ExitCode::FAILURE
    }
}
