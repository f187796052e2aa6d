//! Completions and manual pages, made of what a command line says of itself.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Subcommand;

/// Commands that every program has.
#[derive(Debug, Clone, Subcommand)]
pub enum Pages {
    /// Print completions for a shell, to be sourced: `source <(PROGRAM completions bash)`
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages, one for each command
    #[command(hide = true)]
    Man {
        /// Folder to write them to
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

impl Pages {
    /// Does it, for the program of this command line.
    ///
    /// # Errors
    /// From standard output, or from the folder, which is named.
    pub fn answer(&self, mut command: clap::Command) -> io::Result<()> {
        match self {
            Self::Completions { shell } => {
                let name = command.get_name().to_owned();
                // Straight to a pipe that nobody reads it would panic.
                let mut script = Vec::new();
                clap_complete::generate(*shell, &mut command, name, &mut script);
                io::stdout().write_all(&script)
            }
            Self::Man { out } => {
                let write = || {
                    std::fs::create_dir_all(out)?;
                    clap_mangen::generate_to(command, out)
                };
                write().map_err(|error| io::Error::new(error.kind(), format!("cannot write to {}: {error}", out.display())))
            }
        }
    }
}
