//! The `maptensors` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(maptensors::cli::run(std::env::args_os()))
}
