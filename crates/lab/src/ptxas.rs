//! NVIDIA's assembler, as a judge of generated PTX: no GPU and no CUDA toolkit are needed.
//!
//! In: PTX text. Out: a [`Report`] of what ptxas made of it, or its errors. Called by tests of
//! whatever prints kernels. The assembler is the one of the PyPI package `nvidia-cuda-nvcc`, which
//! `make test-rust` installs into `.venv`; the environment variable `PTXAS` names another.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{env, fs, process};

use thiserror::Error;

/// What ptxas says about a module that it accepts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Its kernels.
    pub entries: Vec<Entry>,
    /// Whatever it warns of: lines that say so, and all notes with a number (C7514: wgmma is
    /// serialised, and its kin), which come as mere information.
    pub warnings: Vec<String>,
}

/// What ptxas says about a kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Named barriers.
    pub barriers: u32,
    /// Bytes of local memory of a thread.
    pub stack: u32,
    /// Bytes of registers that are stored for want of room.
    pub spill_stores: u32,
    /// Bytes that are loaded again.
    pub spill_loads: u32,
    /// Bytes of static shared memory; dynamic shared memory is not counted.
    pub shared_bytes: u32,
}

impl Report {
    /// The kernel of this name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }
}

/// Why there is no report.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no assembler, and none was asked for.
    #[error(
        "PTXAS is not set and there is no {}; `make test-rust` installs it",
        looked.display()
    )]
    Absent {
        /// The place where it would be.
        looked: PathBuf,
    },
    /// There should be one, but it does not run.
    #[error("cannot run {}: {source}", path.display())]
    NotRunnable {
        /// What was tried.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// It refuses the text.
    #[error("ptxas refuses the PTX:\n{0}")]
    Refused(String),
    /// The text could not be put where ptxas finds it.
    #[error("cannot write a temporary file: {0}")]
    Files(#[from] io::Error),
}

/// Assembles a module for `sm_90a`.
///
/// # Errors
/// If there is no assembler, or it refuses the text.
pub fn assemble(ptx: &str) -> Result<Report, Error> {
    let path = find()?;
    let folder = Folder::new()?;
    let (text, cubin) = (folder.0.join("module.ptx"), folder.0.join("module.cubin"));
    fs::write(&text, ptx)?;
    let output = Command::new(&path)
        .args(["-arch=sm_90a", "-v", "-o"])
        .args([&cubin, &text])
        .output()
        .map_err(|source| Error::NotRunnable { path, source })?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    if output.status.success() {
        Ok(parse(&said))
    } else {
        Err(Error::Refused(quote(&said, ptx)))
    }
}

/// Assembles a module for a test. Without an assembler the test is left out, which is said on
/// standard error, unless `PTXAS` is set: then there must be one.
///
/// # Panics
/// If `PTXAS` is set but cannot be run, or the text is refused.
pub fn assembled(ptx: &str) -> Option<Report> {
    match assemble(ptx) {
        Ok(report) => Some(report),
        Err(error @ Error::Absent { .. }) => {
            // Not `eprintln`, which the test harness would keep to itself.
            let _ = writeln!(io::stderr(), "\nassembling is SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// `PTXAS`, or the one in `.venv`.
fn find() -> Result<PathBuf, Error> {
    if let Some(path) = env::var_os("PTXAS") {
        return Ok(path.into());
    }
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/lib");
    let inside = "site-packages/nvidia/cu13/bin/ptxas";
    let pythons = fs::read_dir(&lib).into_iter().flatten().flatten();
    let mut found: Vec<_> = pythons
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path().join(inside))
        .filter(|path| path.exists())
        .collect();
    found.sort();
    found.pop().ok_or_else(|| Error::Absent {
        looked: lib.join("python3*").join(inside),
    })
}

/// A folder of our own, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("flex-block-attn-ptxas-{}-{n}", process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What ptxas says with `-v`, read line by line; what a line says is about the kernel named last.
fn parse(said: &str) -> Report {
    let mut report = Report::default();
    for line in said.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_owned();
            report.entries.push(Entry {
                name,
                ..Entry::default()
            });
        } else if line.contains("warning") || line.contains("(C7") {
            report.warnings.push(line.trim().to_owned());
        }
        let Some(entry) = report.entries.last_mut() else {
            continue;
        };
        for part in line.split([',', ':']) {
            let numbers = [
                ("registers", &mut entry.registers),
                ("barriers", &mut entry.barriers),
                ("bytes stack frame", &mut entry.stack),
                ("bytes spill stores", &mut entry.spill_stores),
                ("bytes spill loads", &mut entry.spill_loads),
                ("bytes smem", &mut entry.shared_bytes),
            ];
            let part = part
                .trim()
                .trim_start_matches("Used ")
                .trim_start_matches("used ");
            for (unit, number) in numbers {
                if let Some(text) = part.strip_suffix(unit) {
                    *number = text.trim().parse().unwrap_or(*number);
                }
            }
        }
    }
    report
}

/// Its messages, each error with the line of PTX that it is about.
fn quote(said: &str, ptx: &str) -> String {
    let quoted = said
        .lines()
        .filter(|line| !line.contains("info"))
        .map(|line| {
            let number = line
                .split_once(", line ")
                .and_then(|(_, rest)| rest.split(';').next());
            let number = number.and_then(|number| number.trim().parse::<usize>().ok());
            match number.and_then(|number| ptx.lines().nth(number.checked_sub(1)?)) {
                Some(text) => format!("{line}\n    {}", text.trim()),
                None => line.to_owned(),
            }
        });
    quoted.collect::<Vec<_>>().join("\n")
}

/// Bytes that a thread of a kernel may keep in memory: for what those who load need at a job's start.
pub fn allowed_spills(name: &str) -> u32 {
    match name.ends_with("_canvas") {
        true => 24,
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 50.217 ms
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas module.ptx, line 7; warning : something is odd
";

    #[test]
    fn reads_what_ptxas_says() {
        let report = parse(SAID);
        let first = Entry {
            name: "first".into(),
            registers: 168,
            barriers: 2,
            stack: 16,
            spill_stores: 8,
            spill_loads: 12,
            shared_bytes: 1024,
        };
        assert_eq!(report.entry("first"), Some(&first));
        assert_eq!(
            report.entry("second").map(|entry| entry.registers),
            Some(10)
        );
        assert_eq!(report.entry("third"), None);
        assert_eq!(report.warnings.len(), 2, "{:?}", report.warnings);
    }

    #[test]
    fn errors_come_with_their_line() {
        let said = "ptxas module.ptx, line 2; error   : no such thing\nptxas fatal   : aborted";
        let text = quote(said, "first\n    second;\nthird");
        assert_eq!(
            text,
            "ptxas module.ptx, line 2; error   : no such thing\n    second;\nptxas fatal   : aborted"
        );
    }
}
