//! How programs find calls that they do not link: by name, or in tables between NVIDIA's own libraries.

use crate::abi::*;
use crate::device::VERSION;
use crate::report;
use std::ffi::{CStr, CString, c_char, c_int, c_void};

/// The address of an exported call of this library.
fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: an all-zero `Dl_info` is valid, and `dladdr` fills it for an address inside this library; its file name
    // lives as long as the library. `RTLD_NOLOAD` only finds what is loaded: this library, so closing the handle
    // again leaves it in place. `dlsym` gets a live handle and a NUL-terminated name.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(symbol as *const c_void, &mut info) == 0 {
            return None;
        }
        let library = libc::dlopen(info.dli_fname, libc::RTLD_NOLOAD | libc::RTLD_LAZY);
        if library.is_null() {
            return None;
        }
        let found = libc::dlsym(library, name.as_ptr());
        libc::dlclose(library);
        (!found.is_null()).then_some(found)
    }
}

/// The newest version of a call: `cuMemAlloc` means `cuMemAlloc_v2`. Versions that differ in their arguments between
/// CUDA 12 and 13 are chosen by the version that the caller was written for.
fn resolve(name: &str, version: c_int) -> Option<*mut c_void> {
    let newest: &[&str] = match name {
        "cuCtxCreate" | "cuStreamGetCaptureInfo" if version < 13_000 => &["_v2", ""],
        "cuCtxCreate" => &["_v4"],
        "cuStreamGetCaptureInfo" => &["_v3"],
        _ => &["_v2", ""],
    };
    newest.iter().find_map(|suffix| symbol(&CString::new(format!("{name}{suffix}")).ok()?))
}

/// Writes the address, or null. That there is none is an error in CUDA 11's version of the call, and in the later one
/// a status beside success; what is missing is named either way.
fn get(name: Text, out: Out<*mut c_void>, version: c_int, status: Option<Out<c_int>>) -> Outcome {
    let name = name.utf8()?;
    if version > VERSION {
        return Err(failure(INVALID_VALUE, format!("{name} of CUDA {version} from a driver of CUDA {VERSION}")));
    }
    let found = name.starts_with("cu").then(|| resolve(name, version)).flatten();
    out.set(found.unwrap_or(std::ptr::null_mut()))?;
    let missing = format!("the simulator has no call `{name}`");
    match (found, status) {
        (Some(_), status) => {
            if let Some(status) = status {
                status.set_if_asked(0);
            }
            Ok(())
        }
        (None, Some(status)) => {
            status.set_if_asked(1);
            report::say(&format!("cuGetProcAddress: {missing}"));
            Ok(())
        }
        (None, None) => Err(failure(NOT_FOUND, missing)),
    }
}

driver_calls! {
    fn cuGetProcAddress(name: Text, out: Out<*mut c_void>, version: c_int, _flags: u64) {
        get(name, out, version, None)
    }

    fn cuGetProcAddress_v2(name: Text, out: Out<*mut c_void>, version: c_int, _flags: u64, status: Out<c_int>) {
        get(name, out, version, Some(status))
    }

    /// Undocumented tables between NVIDIA's libraries. NVRTC asks for one, and takes this answer.
    fn cuGetExportTable(table: Out<*const c_char>, _id: In<u8>) {
        table.set(std::ptr::null())?;
        Err(quiet(NOT_FOUND))
    }
}
