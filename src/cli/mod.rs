//! The command line: what was typed (`args`), what it means (`Job`), doing it.

mod args;
mod compare;
mod delta;
mod demo;
mod edit;
mod help;
mod inspect;
mod interrupt;
mod pages;
mod picture;
mod process;
mod publications;
mod readers;
mod report;
mod smaps;
mod table;
mod text;
mod top;

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, BufWriter, IsTerminal as _, Write};
use std::path::PathBuf;

/// Exit codes, as `--help` lists them.
const DONE: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
/// Of `diff`, `changed` and `verify`, as diff(1) has them.
const DIFFERENT: u8 = 1;
const TROUBLE: u8 = 2;

/// What was asked for.
enum Job {
    Inspect(inspect::Inspect),
    Draw(picture::Draw),
    Top(top::Top),
    Publications(publications::Publications),
    Prefetch(pages::Prefetch),
    Evict(pages::Chosen),
    Checksum(pages::Checksum),
    Edit(edit::Edit),
    Diff(compare::Compare),
    Changed(compare::Compare),
    Verify(compare::Check),
    Delta(delta::Make),
    Apply(delta::Apply),
    Demo {
        /// Where the demo's files stay; `None`: nowhere.
        dir: Option<PathBuf>,
    },
}

/// Runs the command line `args`, of which the first is the program's name, and returns its exit code:
/// 0 done, 1 failed (or, of `diff`, `changed` and `verify`, different), 2 not understood. Writes to the
/// process's standard output and error; never exits.
///
/// ```
/// let args = ["maptensors", "inspect", "models/digits.safetensors"];
/// assert_eq!(maptensors::cli::run(args.map(Into::into)), 0);
/// ```
pub fn run<I: IntoIterator<Item = OsString>>(args: I) -> u8 {
    let typed = match args::parse(args) {
        Ok(typed) => typed,
        Err(answer) => {
            // Help and version, on standard output, or a usage error. If nobody listens, so be it.
            answer.print().ok();
            return if answer.use_stderr() { USAGE } else { DONE };
        }
    };
    let job = match typed.meaning(terminal_width()) {
        Ok(job) => job,
        Err(error) => {
            complain(&*error);
            return USAGE;
        }
    };
    let mut out = BufWriter::new(io::stdout().lock());
    if matches!(job, Job::Diff(_) | Job::Changed(_) | Job::Verify(_)) {
        return answer(&job, out);
    }
    let done = if job.writes() { interrupt::guarded(|| job.run(&mut out)) } else { job.run(&mut out) };
    let done = done.and_then(|code| Ok(out.flush().map(|()| code)?));
    match done {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&*error) => DONE,
        Err(error) => {
            // What was printed before it went wrong stands before the error.
            out.flush().ok();
            complain(&*error);
            FAILED
        }
    }
}

impl Job {
    /// Whether it makes files of models, which are not to be left unfinished.
    fn writes(&self) -> bool {
        matches!(self, Self::Edit(_) | Self::Delta(_) | Self::Apply(_) | Self::Demo { .. })
    }

    fn run(&self, out: &mut impl Write) -> Result<u8, Box<dyn Error>> {
        match self {
            Self::Inspect(inspect) => inspect.run(out),
            Self::Draw(draw) => draw.run(out),
            Self::Top(top) => top.run(out),
            Self::Publications(publications) => publications.run(out),
            Self::Prefetch(prefetch) => prefetch.run(out),
            Self::Evict(chosen) => pages::evict(chosen, out),
            Self::Checksum(checksum) => checksum.run(out),
            Self::Edit(edit) => edit.run(out).map(|()| DONE),
            Self::Diff(compare) => compare.diff(out),
            Self::Changed(compare) => compare.changed(out),
            Self::Verify(check) => check.run(out),
            Self::Delta(make) => make.run(out),
            Self::Apply(apply) => apply.run(out),
            Self::Demo { dir } => demo::run(out, dir.as_deref()).map(|()| DONE),
        }
    }
}

/// For commands whose exit code is the answer: what goes wrong is 2, and it is the same whether or not
/// anybody reads what is printed.
fn answer(job: &Job, mut out: impl Write) -> u8 {
    let mut text = Vec::new();
    let code = job.run(&mut text).unwrap_or_else(|error| {
        complain(&*error);
        TROUBLE
    });
    match out.write_all(&text).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&error);
            TROUBLE
        }
        _ => code,
    }
}

/// The width of the terminal that standard output is, if it is one.
fn terminal_width() -> Option<usize> {
    let stdout = io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    // 0: a terminal that was never told its size.
    rustix::termios::tcgetwinsize(&stdout).ok().map(|size| size.ws_col.into()).filter(|&width| width > 0)
}

/// An error's own words hold its cause's already, so causes are not listed.
fn complain(error: &dyn Error) {
    // Without standard error there is nobody to tell.
    writeln!(io::stderr(), "maptensors: {error}").ok();
}

/// Whether the reader of our output went away, as `head` does. Rust ignores `SIGPIPE`, so it is an error
/// where C programs die silently.
fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
