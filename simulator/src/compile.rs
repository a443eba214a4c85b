use crate::arch::Arch;
use crate::error::LoadError;
use crate::memory::Memory;
use crate::program::Program;
use crate::ptx::ast::Module;
use std::collections::BTreeMap;
pub(crate) const VARIABLE: &str = "variable ";
pub(crate) fn module(_: &Module, _: &Arch, _: &mut Memory, _: &mut BTreeMap<String, (u64, u64)>) -> Result<Vec<Program>, LoadError> {
    Ok(Vec::new())
}
