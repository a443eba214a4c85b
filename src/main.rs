fn main() -> std::process::ExitCode {
    dtr_fused::cli::main()
}
