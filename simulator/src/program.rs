use crate::device::Param;
use crate::ptx::ast::Attributes;
pub(crate) struct Program {
    pub name: String,
    pub params: Vec<Param>,
    pub param_bytes: u32,
    pub static_shared: u32,
    pub local_bytes: u32,
    pub const_bytes: u32,
    pub registers: u32,
    pub attributes: Attributes,
    pub ptx_version: u32,
}
impl Program {
    pub(crate) fn disassemble(&self) -> String {
        String::new()
    }
}
