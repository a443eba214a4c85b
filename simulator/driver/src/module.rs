//! Modules and functions.

use crate::abi::*;
use crate::state::{Function, Handle, State, driver, no_such};
use cuda_sim::Arch;
use cuda_sim::arch::{MAX_THREADS_PER_BLOCK, WARP};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};

/// First bytes of what is not PTX: an ELF CUBIN, a fat binary, the wrapper of one.
const BINARIES: [(&[u8], &str); 3] =
    [(b"\x7fELF", "a CUBIN"), (b"\x50\xed\x55\xba", "a fat binary"), (b"\xb1\x43\x62\x46", "a fat binary")];

fn load(out: Out<Handle>, image: &[u8]) -> Outcome {
    let d = driver()?;
    drop(d.ready()?);
    if let Some((_, what)) = BINARIES.iter().find(|(magic, _)| image.starts_with(magic)) {
        let text = format!("{what} holds machine code, and the simulator runs PTX only: load the PTX instead");
        return Err(failure(NO_BINARY_FOR_GPU, text));
    }
    let ptx = std::str::from_utf8(image).map_err(|e| failure(INVALID_PTX, format!("the PTX is not text: {e}")))?;
    let module = d.device.load_module(ptx).map_err(|e| failure(INVALID_PTX, e.to_string()))?;
    let mut state = d.ready()?;
    let handle = state.handle();
    out.set(handle)?;
    state.modules.insert(handle, module);
    Ok(())
}

fn function(state: &State, handle: Handle) -> Outcome<&Function> {
    state.functions.get(&handle).ok_or_else(|| no_such("function", handle))
}

/// The kernel `name` of a module; the same handle each time.
fn get(state: &mut State, module: Handle, name: &str) -> Outcome<Handle> {
    let loaded = state.modules.get(&module).ok_or_else(|| no_such("module", module))?;
    let known = |(_, f): &(&Handle, &Function)| f.module == module && f.program.name() == name;
    if let Some((handle, _)) = state.functions.iter().find(known) {
        return Ok(*handle);
    }
    let program = loaded.function(name).ok_or_else(|| {
        let all: Vec<_> = loaded.functions().collect();
        failure(NOT_FOUND, format!("the module has no kernel `{name}`; it has: {}", all.join(", ")))
    })?;
    let name = CString::new(name).map_err(|_| failure(INVALID_VALUE, "a kernel's name holds a NUL"))?;
    let handle = state.handle();
    state.functions.insert(handle, Function { module, program, name, max_dynamic_shared: None, carveout: -1 });
    Ok(handle)
}

/// The most threads of a block: whole warps where the assembler's number of registers limits it.
fn most_threads(arch: &Arch, p: &cuda_sim::Function, registers: Option<u32>) -> u32 {
    let warps = (1..=MAX_THREADS_PER_BLOCK / WARP).rev();
    let fits = |threads: &u32| registers.is_none_or(|r| arch.registers_fit(*threads, r));
    p.max_threads().min(warps.map(|w| w * WARP).find(fits).unwrap_or(0))
}

fn attribute(f: &Function, id: c_uint) -> Outcome<c_int> {
    let d = driver()?;
    let p = &f.program;
    let int = |n: u32| c_int::try_from(n).unwrap_or(c_int::MAX);
    Ok(match id {
        0 => int(most_threads(&d.config.arch, p, d.config.registers.get(p.name()).copied())),
        1 => int(p.static_shared()),
        2 => int(p.const_bytes()),
        3 => int(p.local_bytes()),
        4 => int(d.config.registers.get(p.name()).copied().unwrap_or(p.registers())),
        5 => int(p.ptx_version()),
        6 => int(d.config.arch.number()),
        7 => 0,
        8 => int(f.max_dynamic_shared.unwrap_or(cuda_sim::arch::SHARED_DEFAULT.saturating_sub(p.static_shared()))),
        9 => f.carveout,
        10..=15 => 0,
        _ => return Err(failure(INVALID_VALUE, format!("function attribute {id} is not known to the simulator"))),
    })
}

fn set_attribute(handle: Handle, id: c_uint, value: c_int) -> Outcome {
    let d = driver()?;
    let mut state = d.ready()?;
    let f = state.functions.get_mut(&handle).ok_or_else(|| no_such("function", handle))?;
    match id {
        8 => {
            let (optin, fixed) = (d.config.arch.shared_per_block_optin, f.program.static_shared());
            let most = optin.saturating_sub(fixed);
            let value = u32::try_from(value).ok().filter(|v| *v <= most).ok_or_else(|| {
                let text = format!(
                    "{value} bytes of dynamic shared memory for {}: {} allows 0 to {most} besides {fixed} static bytes",
                    f.program.name(),
                    d.config.arch.name
                );
                failure(INVALID_VALUE, text)
            })?;
            f.max_dynamic_shared = Some(value);
            Ok(())
        }
        9 if (-1..=100).contains(&value) => {
            f.carveout = value;
            Ok(())
        }
        // Cluster attributes, which a launch checks.
        10..=15 => Ok(()),
        _ => Err(failure(INVALID_VALUE, format!("function attribute {id} cannot be set to {value}"))),
    }
}

driver_calls! {
    fn cuModuleLoadData(out: Out<Handle>, image: Text) {
        load(out, image.bytes()?)
    }

    fn cuModuleLoadDataEx(out: Out<Handle>, image: Text, _count: c_uint, _options: In<c_uint>, _values: In<usize>) {
        load(out, image.bytes()?)
    }

    fn cuModuleLoadFatBinary(_out: Out<Handle>, _image: In<u8>) {
        Err(failure(NO_BINARY_FOR_GPU, "a fat binary holds machine code, and the simulator runs PTX only"))
    }

    fn cuModuleLoad(out: Out<Handle>, path: Text) {
        let path = path.utf8()?;
        let mut image = std::fs::read(path).map_err(|e| failure(FILE_NOT_FOUND, format!("{path}: {e}")))?;
        while image.last() == Some(&0) {
            image.pop();
        }
        load(out, &image)
    }

    fn cuModuleUnload(module: Handle) {
        let d = driver()?;
        let gone = {
            let mut state = d.lock();
            state.functions.retain(|_, f| f.module != module);
            state.modules.remove(&module)
        };
        gone.map(drop).ok_or_else(|| no_such("module", module))
    }

    fn cuModuleGetFunction(out: Out<Handle>, module: Handle, name: Text) {
        let mut state = driver()?.ready()?;
        let handle = get(&mut state, module, name.utf8()?)?;
        out.set(handle)
    }

    fn cuModuleGetFunctionCount(count: Out<c_uint>, module: Handle) {
        let state = driver()?.ready()?;
        let module = state.modules.get(&module).ok_or_else(|| no_such("module", module))?;
        count.set(module.functions().count() as c_uint)
    }

    fn cuModuleEnumerateFunctions(out: Out<Handle>, count: c_uint, module: Handle) {
        let mut state = driver()?.ready()?;
        let loaded = state.modules.get(&module).ok_or_else(|| no_such("module", module))?;
        let names: Vec<String> = loaded.functions().take(count as usize).map(str::to_owned).collect();
        let handles: Outcome<Vec<Handle>> = names.iter().map(|n| get(&mut state, module, n)).collect();
        out.set_all(&handles?)
    }

    fn cuModuleGetGlobal_v2(address: Out<u64>, bytes: Out<usize>, module: Handle, name: Text) {
        let state = driver()?.ready()?;
        let module = state.modules.get(&module).ok_or_else(|| no_such("module", module))?;
        let name = name.utf8()?;
        let found = module.global(name);
        let (at, n) = found.ok_or_else(|| failure(NOT_FOUND, format!("the module has no variable `{name}`")))?;
        address.set_if_asked(at);
        bytes.set_if_asked(n as usize);
        Ok(())
    }

    fn cuModuleGetLoadingMode(mode: Out<c_uint>) {
        driver()?;
        mode.set(1)
    }

    fn cuFuncGetAttribute(value: Out<c_int>, id: c_uint, handle: Handle) {
        let state = driver()?.ready()?;
        value.set(attribute(function(&state, handle)?, id)?)
    }

    fn cuFuncSetAttribute(handle: Handle, id: c_uint, value: c_int) {
        set_attribute(handle, id, value)
    }

    fn cuFuncSetCacheConfig(handle: Handle, _config: c_uint) {
        function(&*driver()?.ready()?, handle).map(|_| ())
    }

    fn cuFuncGetModule(module: Out<Handle>, handle: Handle) {
        let state = driver()?.ready()?;
        module.set(function(&state, handle)?.module)
    }

    fn cuFuncGetName(name: Out<*const c_char>, handle: Handle) {
        let state = driver()?.ready()?;
        name.set(function(&state, handle)?.name.as_ptr())
    }

    fn cuFuncGetParamInfo(handle: Handle, index: usize, offset: Out<usize>, bytes: Out<usize>) {
        let state = driver()?.ready()?;
        let f = function(&state, handle)?;
        let params = f.program.params();
        let text = || format!("kernel {} has {} parameters, none at index {index}", f.program.name(), params.len());
        let p = params.get(index).ok_or_else(|| failure(INVALID_VALUE, text()))?;
        offset.set(p.offset as usize)?;
        bytes.set_if_asked(p.bytes as usize);
        Ok(())
    }

    fn cuFuncIsLoaded(loaded: Out<c_int>, handle: Handle) {
        let state = driver()?.ready()?;
        function(&state, handle)?;
        loaded.set(1)
    }

    fn cuFuncLoad(handle: Handle) {
        function(&*driver()?.ready()?, handle).map(|_| ())
    }

    fn cuLibraryLoadData(
        _out: Out<Handle>, _image: In<u8>, _o: In<c_uint>, _v: In<*mut c_void>, _n: c_uint, _lo: In<c_uint>,
        _lv: In<*mut c_void>, _ln: c_uint,
    ) {
        Err(failure(NOT_SUPPORTED, "libraries are not simulated: load a module with cuModuleLoadData"))
    }
}
