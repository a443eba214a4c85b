use crate::arch::Arch;
use crate::counters::LaunchReport;
use crate::device::LaunchConfig;
use crate::error::Fault;
use crate::memory::Memory;
use crate::options::Options;
use crate::program::Program;
pub(crate) fn launch(_: &Arch, _: &Options, _: &Memory, _: &Program, _: &LaunchConfig, _: &[u8]) -> Result<LaunchReport, Fault> {
    Err(Fault::refused(801, "not built yet"))
}
