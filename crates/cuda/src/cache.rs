//! Compiled kernels on disk, so that a process needs not compile what another has.
//!
//! In: what the code depends on (the PTX, the driver, the GPU's architecture). Out: machine code.
//! A file holds a checksum before the code and appears whole, by a rename: any number of processes
//! may share a folder. A file that is damaged is built anew; a folder that cannot be written to
//! costs time, never an answer.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// Names the folder; empty for none.
pub const VARIABLE: &str = "FLEX_BLOCK_ATTN_CACHE_DIR";

/// What a file starts with; its number is that of the format.
const MAGIC: &[u8; 8] = b"fbacode1";
const CHECKSUM_BYTES: usize = 32;

/// The folder of this process: `FLEX_BLOCK_ATTN_CACHE_DIR`, else `flex-block-attn` in
/// `XDG_CACHE_HOME`, in `LOCALAPPDATA` or in `~/.cache`. None if the first is empty, or nothing is
/// set.
pub fn folder() -> Option<PathBuf> {
    folder_from(|name| std::env::var_os(name).map(PathBuf::from))
}

fn folder_from(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|path| !path.as_os_str().is_empty());
    if variable(VARIABLE).is_some() {
        return set(VARIABLE);
    }
    set("XDG_CACHE_HOME")
        .or_else(|| set("LOCALAPPDATA"))
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|parent| parent.join("flex-block-attn"))
}

/// What a folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Compiled kernels.
    pub files: usize,
    /// Their bytes together.
    pub bytes: u64,
}

/// What a folder holds; nothing if there is none.
///
/// # Errors
/// When it cannot be read.
pub fn usage(folder: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let entries = match folder.read_dir() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(usage),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry
            .path()
            .extension()
            .is_some_and(|name| name == EXTENSION)
        {
            usage.files += 1;
            usage.bytes += entry.metadata()?.len();
        }
    }
    Ok(usage)
}

/// Whether files can be written to a folder, which is made if need be.
///
/// # Errors
/// When they cannot.
pub fn probe(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    tempfile::NamedTempFile::new_in(folder).map(drop)
}

const EXTENSION: &str = "cubin";

/// Where code came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Disk,
    Built,
}

/// A place for one kernel's code.
#[derive(Debug, Clone)]
pub(crate) struct Slot {
    path: Option<PathBuf>,
}

impl Slot {
    /// The place of what depends on `parts`, in order; nowhere if there is no folder.
    pub(crate) fn new(folder: Option<&Path>, parts: &[&str]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            // Lengths keep ("ab", "c") apart from ("a", "bc").
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let name: String = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self {
            path: folder.map(|folder| folder.join(name).with_extension(EXTENSION)),
        }
    }

    /// The code: what is there, or what `build` makes, which is then kept.
    pub(crate) fn get_or_build<E>(
        &self,
        build: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<(Vec<u8>, Source), E> {
        match self.read() {
            Some(code) => Ok((code, Source::Disk)),
            None => Ok((self.build(build)?, Source::Built)),
        }
    }

    /// What `build` makes, which takes the place of what is there.
    pub(crate) fn build<E>(
        &self,
        build: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let code = build()?;
        // Whether it could be kept is for `probe` to say.
        let _ = self.write(&code);
        Ok(code)
    }

    fn read(&self) -> Option<Vec<u8>> {
        let mut file = std::fs::read(self.path.as_ref()?).ok()?;
        let (checksum, code) = file.strip_prefix(MAGIC)?.split_at_checked(CHECKSUM_BYTES)?;
        if Sha256::digest(code).as_slice() != checksum {
            return None;
        }
        file.drain(..MAGIC.len() + CHECKSUM_BYTES);
        Some(file)
    }

    fn write(&self, code: &[u8]) -> io::Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(MAGIC)?;
        file.write_all(&Sha256::digest(code))?;
        file.write_all(code)?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn get(slot: &Slot, code: &[u8]) -> (Vec<u8>, Source) {
        let result = slot.get_or_build(|| Ok::<_, Infallible>(code.to_vec()));
        result.expect("infallible")
    }

    fn file(slot: &Slot) -> &Path {
        slot.path.as_deref().expect("a folder was given")
    }

    #[test]
    fn code_is_built_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let slot = Slot::new(Some(folder.path()), &["kernel", "driver"]);
        assert_eq!(get(&slot, b"code"), (b"code".to_vec(), Source::Built));
        assert_eq!(get(&slot, b"other"), (b"code".to_vec(), Source::Disk));
        let other = Slot::new(Some(folder.path()), &["kerneld", "river"]);
        assert_eq!(get(&other, b"other"), (b"other".to_vec(), Source::Built));
        let usage = usage(folder.path()).expect("readable");
        assert_eq!((usage.files, usage.bytes), (2, 2 * (8 + 32) + 4 + 5));
    }

    #[test]
    fn damaged_files_are_built_anew() {
        let folder = tempfile::tempdir().expect("a folder");
        let slot = Slot::new(Some(folder.path()), &["kernel"]);
        get(&slot, b"code");
        let whole = std::fs::read(file(&slot)).expect("it was written");
        let mut flipped = whole.clone();
        *flipped.last_mut().expect("not empty") ^= 1;
        let mut older = whole.clone();
        older[7] = b'0';
        for damaged in [
            &b""[..],
            &whole[..20],
            &whole[..whole.len() - 1],
            &flipped,
            &older,
        ] {
            std::fs::write(file(&slot), damaged).expect("writable");
            assert_eq!(get(&slot, b"code").1, Source::Built, "{damaged:?}");
            assert_eq!(std::fs::read(file(&slot)).expect("written"), whole);
        }
    }

    #[test]
    fn without_a_folder_code_is_built_each_time() {
        let slot = Slot::new(None, &["kernel"]);
        assert_eq!(get(&slot, b"code").1, Source::Built);
        assert_eq!(get(&slot, b"code").1, Source::Built);
        // A file in the folder's place: nothing can be written there.
        let file = tempfile::NamedTempFile::new().expect("a file");
        let slot = Slot::new(Some(file.path()), &["kernel"]);
        assert_eq!(get(&slot, b"code"), (b"code".to_vec(), Source::Built));
        assert!(probe(file.path()).is_err());
    }

    #[test]
    fn failures_to_build_are_passed_on() {
        let folder = tempfile::tempdir().expect("a folder");
        let slot = Slot::new(Some(folder.path()), &["kernel"]);
        assert_eq!(slot.get_or_build(|| Err("no")), Err("no"));
        assert!(!file(&slot).exists());
    }

    #[test]
    fn many_writers_leave_one_whole_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let code = vec![7; 1 << 20];
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let slot = Slot::new(Some(folder.path()), &["kernel"]);
                    for _ in 0..8 {
                        slot.build(|| Ok::<_, Infallible>(code.clone()))
                            .expect("infallible");
                        assert_eq!(get(&slot, &code), (code.clone(), Source::Disk));
                    }
                });
            }
        });
        let left = folder.path().read_dir().expect("readable").count();
        assert_eq!(left, 1, "files left behind");
    }

    #[test]
    fn the_folder_is_the_users_choice() {
        let folder = |variables: &[(&str, &str)]| {
            let of = |name: &str| variables.iter().find(|(known, _)| *known == name);
            folder_from(|name| of(name).map(|(_, value)| PathBuf::from(value)))
        };
        let home = ("HOME", "/home/u");
        let xdg = ("XDG_CACHE_HOME", "/x");
        assert_eq!(folder(&[(VARIABLE, "/a"), xdg, home]), Some("/a".into()));
        assert_eq!(folder(&[(VARIABLE, ""), xdg, home]), None);
        assert_eq!(folder(&[xdg, home]), Some("/x/flex-block-attn".into()));
        assert_eq!(
            folder(&[home]),
            Some("/home/u/.cache/flex-block-attn".into())
        );
        assert_eq!(folder(&[]), None);
    }
}
