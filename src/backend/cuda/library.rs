//! Finds libcuda and NVRTC.
//!
//! Both are looked for where the system looks for libraries. `DTR_CUDA_LIBRARY` names another libcuda (a simulated driver,
//! say), and `DTR_NVRTC_FOLDER` the folder of NVRTC's two files.

use crate::error::{Error, Result};
use cudarc::{driver, nvrtc};
use libloading::Library;
use std::ffi::OsString;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Mutex;

/// Path of the driver library to use instead of the system's.
pub const CUDA_LIBRARY: &str = "DTR_CUDA_LIBRARY";
/// Folder with `libnvrtc.so.13` and `libnvrtc-builtins.so.13.0`.
pub const NVRTC_FOLDER: &str = "DTR_NVRTC_FOLDER";

/// Loads a library for good, so that cudarc, which opens it by name, gets this one (unless it finds another under a name that it tries
/// before). The address of `symbol`, which tells whether it is the right one; 0 without.
fn preload(path: &Path, variable: &str, symbol: Option<&str>) -> Result<usize> {
    let refused = |why: String| Error::file(path, format!("{variable} names it, but {why}"));
    let size = |e| refused(format!("it cannot be loaded: {e}"));
    if is_cut(path).map_err(size)? {
        return Err(refused("it cannot be loaded: its end is missing".into()));
    }
    // SAFETY: the user named this file as the library to run; NVIDIA's and the simulator's initialisers have no
    // preconditions.
    let library = unsafe { Library::new(path) }.map_err(|e| refused(format!("it cannot be loaded: {e}")))?;
    let address = match symbol {
        Some(symbol) => {
            address_of(&library, symbol).ok_or_else(|| refused(format!("it has no {symbol}: it is another library")))?
        }
        None => 0,
    };
    std::mem::forget(library);
    Ok(address)
}

/// Where `symbol` of a library is.
fn address_of(library: &Library, symbol: &str) -> Option<usize> {
    // SAFETY: the address is only compared, so its type does not matter.
    unsafe { library.get::<*const ()>(symbol.as_bytes()) }.ok().map(|symbol| (*symbol).addr())
}

/// Whether a 64-bit ELF file ends before what its program header says it holds: the loader would map what is not there, and
/// the process would be killed on the first touch. False for all other files, which the loader refuses by itself.
fn is_cut(path: &Path) -> std::io::Result<bool> {
    const ENTRY: usize = 56;
    const LOAD: u64 = 1;
    // A little-endian number of `bytes` bytes.
    let number = |from: &[u8], at: usize, bytes: usize| {
        from[at..at + bytes].iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b))
    };
    let mut file = std::fs::File::open(path)?;
    let len = file.metadata()?.len();
    let mut header = Vec::new();
    file.by_ref().take(64).read_to_end(&mut header)?;
    if header.len() < 64 || !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(false);
    }
    let (table, count) = (number(&header, 32, 8), number(&header, 56, 2));
    let mut entries = Vec::new();
    file.seek(SeekFrom::Start(table))?;
    file.take(count * ENTRY as u64).read_to_end(&mut entries)?;
    let end = |entry: &[u8]| number(entry, 8, 8).saturating_add(number(entry, 32, 8));
    let mut whole = entries.chunks_exact(ENTRY);
    let missing = (whole.len() as u64) < count;
    Ok(missing || whole.any(|entry| number(entry, 0, 4) == LOAD && end(entry) > len))
}

/// The value of an environment variable, if it is set and not empty.
pub(super) fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Makes the driver library available.
///
/// # Errors
/// When there is none.
pub fn load_driver() -> Result<()> {
    static LOADED: Mutex<bool> = Mutex::new(false);
    let mut loaded = LOADED.lock().unwrap_or_else(|e| e.into_inner());
    if *loaded {
        return Ok(());
    }
    const SYMBOL: &str = "cuInit";
    let named = variable(CUDA_LIBRARY).map(|path| preload(Path::new(&path), CUDA_LIBRARY, Some(SYMBOL)));
    let named = named.transpose()?;
    // SAFETY: only tries to open libraries by their names.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(Error::usage(format!(
            "there is no CUDA driver (libcuda.so) on this machine; {CUDA_LIBRARY} may name one elsewhere"
        )));
    }
    // cudarc may have found another one, under a name that it tries before.
    // SAFETY: there is one.
    if named.is_some() && address_of(unsafe { driver::sys::culib() }, SYMBOL) != named {
        return Err(Error::usage(format!(
            "the system's CUDA driver is found before the one that {CUDA_LIBRARY} names: unset it to use the system's, or call that one's \
             folder first in LD_LIBRARY_PATH"
        )));
    }
    *loaded = true;
    Ok(())
}

/// Makes NVRTC available.
///
/// # Errors
/// When there is none.
pub fn load_nvrtc() -> Result<()> {
    static LOADED: Mutex<bool> = Mutex::new(false);
    let mut loaded = LOADED.lock().unwrap_or_else(|e| e.into_inner());
    if *loaded {
        return Ok(());
    }
    // Where a toolkit's is found before, that may be used: `nvrtc::version` refuses those that do not fit.
    if let Some(folder) = variable(NVRTC_FOLDER) {
        // The builtins first: NVRTC opens them by name and has no path to them.
        for (file, symbol) in [("libnvrtc-builtins.so.13.0", None), ("libnvrtc.so.13", Some("nvrtcVersion"))] {
            preload(&Path::new(&folder).join(file), NVRTC_FOLDER, symbol)?;
        }
    }
    // SAFETY: only tries to open libraries by their names.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(Error::usage(format!(
            "there is no NVRTC (libnvrtc.so.13), which compiles the kernels: run scripts/fetch-nvrtc and set \
             {NVRTC_FOLDER}=target/nvrtc, or install the CUDA toolkit 13"
        )));
    }
    *loaded = true;
    Ok(())
}
