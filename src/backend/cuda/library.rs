//! Finds libcuda and NVRTC.
//!
//! Both are looked for where the system looks for libraries. `DTR_CUDA_LIBRARY` names another libcuda (a simulated driver,
//! say), and `DTR_NVRTC_FOLDER` the folder of NVRTC's two files.

use crate::error::{Error, Result};
use cudarc::{driver, nvrtc};
use std::path::Path;
use std::sync::Mutex;

/// Path of the driver library to use instead of the system's.
pub const CUDA_LIBRARY: &str = "DTR_CUDA_LIBRARY";
/// Folder with `libnvrtc.so.13` and `libnvrtc-builtins.so.13.0`.
pub const NVRTC_FOLDER: &str = "DTR_NVRTC_FOLDER";

/// Loads a library for good, so that cudarc, which opens it by name, gets this one.
fn preload(path: &Path, variable: &str) -> Result<()> {
    // SAFETY: the user named this file as the library to run; NVIDIA's and the simulator's initialisers have no
    // preconditions.
    match unsafe { libloading::Library::new(path) } {
        Ok(library) => {
            std::mem::forget(library);
            Ok(())
        }
        Err(e) => Err(Error::file(path, format!("{variable} names it, but it cannot be loaded: {e}"))),
    }
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
    if let Some(path) = std::env::var_os(CUDA_LIBRARY) {
        preload(Path::new(&path), CUDA_LIBRARY)?;
    }
    // SAFETY: only tries to open libraries by their names.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(Error::usage("there is no CUDA driver (libcuda.so) on this machine"));
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
    if let Some(folder) = std::env::var_os(NVRTC_FOLDER) {
        // The builtins first: NVRTC opens them by name and has no path to them.
        for file in ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"] {
            preload(&Path::new(&folder).join(file), NVRTC_FOLDER)?;
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
