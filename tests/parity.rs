//! Golden tensors of the published PyTorch code pass; whatever is off, damaged, unknown or missing fails.

use dtr_fused::backend::Compute;
use dtr_fused::backend::cuda::DType;
use dtr_fused::parity::{Report, Row, check_dir, check_reference};
use std::path::{Path, PathBuf};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The report of a single case.
fn check(dir: &Path) -> Report {
    let mut cases = check_dir(dir, &Compute::Cpu { elem: DType::F32 }).unwrap();
    assert_eq!(cases.len(), 1);
    cases.pop().unwrap().1
}

/// The sentences of all rows that fail, with their names.
fn failures(report: &Report) -> Vec<String> {
    let text = |row: &Row| match row {
        Row::Compared { name, check } => format!("{name}: {} > {}", check.error, check.tolerance),
        Row::Failed { name, why } | Row::Note { name, why } => format!("{name}: {why}"),
    };
    report.rows.iter().filter(|row| row.fails()).map(text).collect()
}

/// The names of all tensors that were compared.
fn compared(report: &Report) -> Vec<&str> {
    let name = |row: &'_ Row| matches!(row, Row::Compared { .. });
    report.rows.iter().filter(|row| name(row)).map(|row| row.name()).collect()
}

#[test]
fn the_plain_loops_pass_every_golden_case() {
    let mut compared = 0;
    for (dir, report) in check_reference(&golden()).unwrap() {
        assert!(report.passed(), "{}\n{report}", dir.display());
        compared += report.compared();
    }
    assert!(compared > 1000, "{compared} tensors");
}

/// In bf16 too, within three times the error of plain loops in bf16. (Without AMX the specification of its kernels computes it. Trajectories
/// and training take longer; `dtr-fused parity --precision bf16` compares them too.)
#[test]
fn models_agree_in_bf16_as_well_as_plain_loops_do() {
    let mut compared = 0;
    for case in ["a", "c", "small"] {
        let copy = tempfile::tempdir().unwrap();
        for file in std::fs::read_dir(golden().join(case)).unwrap().map(|file| file.unwrap().path()) {
            let name = file.file_name().unwrap().to_str().unwrap();
            if !["sampling", "train"].iter().any(|long| name.starts_with(long)) {
                std::fs::copy(&file, copy.path().join(name)).unwrap();
            }
        }
        let in_bf16 = check_dir(copy.path(), &Compute::Cpu { elem: DType::Bf16 }).unwrap();
        let in_f32 = check_dir(copy.path(), &Compute::Cpu { elem: DType::F32 }).unwrap();
        for ((_, report), (_, in_f32)) in in_bf16.iter().zip(&in_f32) {
            assert!(report.passed(), "{case}\n{report}");
            assert!(report.to_string() != in_f32.to_string(), "{case} is not in bf16");
            compared += report.compared();
        }
    }
    assert!(compared > 600, "{compared} tensors");
}

#[test]
fn every_golden_case_passes() {
    let cases = check_dir(&golden(), &Compute::Cpu { elem: DType::F32 }).unwrap();
    let names: Vec<_> = cases.iter().map(|(dir, _)| dir.file_name().unwrap().to_str().unwrap()).collect();
    for expected in ["a", "c", "d", "masks", "nll", "schedules", "small"] {
        assert!(names.contains(&expected), "{expected} is missing in {names:?}");
    }
    for (dir, report) in &cases {
        assert!(report.passed(), "{}\n{report}", dir.display());
    }
    // Nothing that the case holds may be left out unnoticed.
    let a = &cases.iter().find(|(dir, _)| dir.ends_with("a")).unwrap().1;
    let names = compared(a);
    for expected in [
        "forward out",
        "forward grad_x",
        "forward out_cfg1.5",
        "forward act.block1",
        "sublayer_forward out",
        "loss_linear_min_snr_5 loss",
        "loss_cosine_uw grad.loss_scale",
        "loss_cosine_constant_sublayer d_model_out",
        "loss_linear_p2weight_1_1_persample weight",
        "grads_cosine_constant grad.blocks.1.attn.qkv.bias",
        "grads_cosine_constant_sublayer grad.x_embedder.proj.weight",
        "grads_cosine_uw grad.final_layer.linear.weight",
        "train20 loss_per_step",
        "train20 probe_out_ema",
        "train20 final.blocks.0.attn.qkv.bias",
        "sampling ddpm_cosine_noclip.traj",
        "sampling ddim_linear_clip_eta0.5.final",
    ] {
        assert!(names.contains(&expected), "{expected} was not compared");
    }
    assert!(names.len() > 500, "only {} tensors", names.len());
}

/// A copy of files of a golden case that a test may damage.
struct Copy(tempfile::TempDir);

impl Copy {
    fn of(case: &str, files: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            std::fs::copy(golden().join(case).join(file), dir.path().join(file)).unwrap();
        }
        Copy(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn edit(&self, file: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let path = self.path().join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        edit(&mut bytes);
        std::fs::write(path, bytes).unwrap();
    }

    /// Overwrites the first bytes of a tensor.
    fn put(&self, file: &str, tensor: &str, value: &[u8]) {
        self.edit(file, |bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
            let start = 8 + length + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
            bytes[start..start + value.len()].copy_from_slice(value);
        });
    }

    /// Replaces a text of the header by another of the same length.
    fn rename(&self, file: &str, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        self.edit(file, |bytes| {
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        });
    }

    /// Asserts that exactly the rows that begin with these words fail.
    fn assert_fails(&self, expected: &[&str]) {
        let failures = failures(&check(self.path()));
        let fits = failures.len() == expected.len() && failures.iter().zip(expected).all(|(f, e)| f.contains(e));
        assert!(fits, "expected {expected:?}, got {failures:#?}");
    }
}

const FORWARD: [&str; 3] = ["config.json", "params.safetensors", "forward.safetensors"];

#[test]
fn a_perturbed_tensor_fails() {
    let copy = Copy::of("c", &FORWARD);
    assert!(check(copy.path()).passed());
    copy.put("forward.safetensors", "out.f64", &1.0f64.to_le_bytes());
    copy.assert_fails(&["forward out: "]);

    let copy = Copy::of("c", &[&FORWARD[..], &["loss_cosine_constant.safetensors"]].concat());
    assert!(check(copy.path()).passed());
    copy.put("loss_cosine_constant.safetensors", "vb.f64", &1.0f64.to_le_bytes());
    copy.put("loss_cosine_constant.safetensors", "gradnorm.blocks.0.attn.proj.weight", &1e-3f64.to_le_bytes());
    copy.assert_fails(&["gradnorm.blocks.0.attn.proj.weight: ", "vb: "]);

    let copy = Copy::of("masks", &["masks.safetensors"]);
    assert!(check(copy.path()).passed());
    copy.put("masks.safetensors", "C96_beta0.5_alpha4.start", &1i32.to_le_bytes());
    copy.assert_fails(&["masks C96_beta0.5_alpha4.start: 1 > 0"]);

    let copy = Copy::of("schedules", &["schedules.safetensors"]);
    copy.put("schedules.safetensors", "linear_full.betas", &1.000001e-4f64.to_le_bytes());
    copy.assert_fails(&["schedules linear_full.betas: "]);
}

#[test]
fn wrong_weights_fail_everywhere() {
    let copy = Copy::of("c", &FORWARD);
    copy.put("params.safetensors", "final_layer.linear.bias", &3.0f32.to_le_bytes());
    copy.assert_fails(&["forward out: ", "forward out_cfg1.5: "]);
}

#[test]
fn a_nan_fails_on_either_side() {
    for nan in [f64::NAN, f64::INFINITY] {
        let copy = Copy::of("c", &FORWARD);
        copy.put("forward.safetensors", "out.f64", &nan.to_le_bytes());
        copy.assert_fails(&["forward out: NaN"]);
        let copy = Copy::of("nll", &["nll.safetensors"]);
        copy.put("nll.safetensors", "kl.f64", &nan.to_le_bytes());
        copy.put("nll.safetensors", "ll.f64", &nan.to_le_bytes());
        assert_eq!(failures(&check(copy.path())).len(), 2);
    }
    let copy = Copy::of("c", &FORWARD);
    copy.put("params.safetensors", "x_embedder.proj.bias", &f32::NAN.to_le_bytes());
    let failures = failures(&check(copy.path()));
    assert!(failures.iter().any(|f| f.starts_with("forward out: NaN")), "{failures:#?}");
}

#[test]
fn an_empty_directory_fails() {
    let copy = Copy::of("c", &[]);
    assert!(!check(copy.path()).passed());
    std::fs::create_dir(copy.path().join("inside")).unwrap();
    let report = check(copy.path());
    assert!(!report.passed() && report.compared() == 0);
    // A model with nothing to compare it with is not enough, but its positions are compared.
    let copy = Copy::of("c", &["config.json"]);
    copy.assert_fails(&["model: params.safetensors is missing"]);
    assert!(
        check_dir(&copy.path().join("nowhere"), &Compute::Cpu { elem: DType::F32 })
            .unwrap_err()
            .to_string()
            .contains("nowhere")
    );
}

#[test]
fn what_is_not_understood_fails() {
    let copy = Copy::of("masks", &["masks.safetensors"]);
    std::fs::write(copy.path().join("README.md"), "ignored").unwrap();
    assert!(check(copy.path()).passed());
    std::fs::write(copy.path().join("masks.npy"), "").unwrap();
    copy.assert_fails(&["masks.npy: this file is not understood"]);

    let copy = Copy::of("c", &FORWARD);
    copy.rename("forward.safetensors", "\"grad_x\"", "\"grad_z\"");
    copy.assert_fails(&["forward grad_z: this tensor is not understood"]);
    let copy = Copy::of("c", &FORWARD);
    std::fs::copy(
        golden().join("c/loss_linear_constant.safetensors"),
        copy.path().join("loss_sqrt_constant.safetensors"),
    )
    .unwrap();
    copy.assert_fails(&["loss_sqrt_constant.safetensors: this file is not understood"]);
}

#[test]
fn losses_of_published_code_that_errs_are_only_listed() {
    let copy = Copy::of("c", &FORWARD);
    let to = copy.path().join("loss_linear_p2weight_1_1_official.safetensors");
    std::fs::copy(golden().join("c/loss_linear_constant.safetensors"), to).unwrap();
    let report = check(copy.path());
    assert!(report.passed(), "{report}");
    assert!(report.to_string().contains("loss_linear_p2weight_1_1_official"), "{report}");
}

#[test]
fn damaged_files_fail_with_a_sentence() {
    let copy = Copy::of("c", &FORWARD);
    copy.edit("forward.safetensors", |bytes| bytes.truncate(bytes.len() / 2));
    copy.assert_fails(&["cut short"]);
    let copy = Copy::of("c", &FORWARD);
    copy.edit("params.safetensors", |bytes| bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes()));
    copy.assert_fails(&["claims a header of 1152921504606846976 bytes", "params.safetensors is missing"]);
    let copy = Copy::of("c", &FORWARD);
    copy.put("forward.safetensors", "t", &1000i64.to_le_bytes());
    copy.assert_fails(&["timestep 1000"]);
    let copy = Copy::of("c", &FORWARD);
    copy.put("forward.safetensors", "t", &(-1i64).to_le_bytes());
    copy.assert_fails(&["must hold integers of at least 0"]);
    let copy = Copy::of("c", &FORWARD);
    copy.put("forward.safetensors", "y", &11i64.to_le_bytes());
    copy.assert_fails(&["11"]);
    let copy = Copy::of("d", &[&FORWARD[..], &["routing.safetensors"]].concat());
    assert!(check(copy.path()).passed());
    copy.put("routing.safetensors", "blocks.1.mask", &[2]);
    copy.assert_fails(&["holds 2, but a mask is 0 or 1"]);
    std::fs::remove_file(copy.path().join("routing.safetensors")).unwrap();
    copy.assert_fails(&["routing.safetensors must be beside it"]);
}

#[test]
fn a_configuration_that_lies_is_refused_before_it_costs_anything() {
    let good = std::fs::read_to_string(golden().join("c/config.json")).unwrap();
    for (from, to, expected) in [
        ("\"depth\": 2", "\"depth\": 1000000", "blocks.999999"),
        ("\"depth\": 2", "\"depth\": 0", "depth is 0"),
        ("\"depth\": 2", "\"depth\": -1", "config.json"),
        ("\"depth\": 2", "\"depth\": 1e30", "config.json"),
        ("\"input_size\": 8", "\"input_size\": 512", "pos_embed"),
        ("\"input_size\": 8", "\"input_size\": 1048576", "make positions of"),
        ("\"num_classes\": 10", "\"num_classes\": 1000000", "embedding_table"),
        ("\"hidden_size\": 64", "\"hidden_size\": 65536", "x_embedder.proj.weight"),
        ("\"hidden_size\": 64", "\"hidden_size\": 524288", "parameters"),
        ("\"mlp_ratio\": 4.0", "\"mlp_ratio\": 60", "fc1"),
        ("\"beta\": 1.0", "\"beta\": 1.5", "beta"),
        ("\"taskcount\": 1000", "\"taskcount\": 4000000", "taskcount"),
        ("\"ln_eps\": 1e-06", "\"ln_eps\": 1e-05", "ln_eps"),
        ("\"init_method\": \"DTR\"", "\"init_method\": \"other\"", "init_method"),
        ("\"num_heads\": 4,", "", "num_heads"),
        ("}", "", "config.json"),
    ] {
        let copy = Copy::of("c", &FORWARD);
        assert!(good.contains(from));
        std::fs::write(copy.path().join("config.json"), good.replacen(from, to, 1)).unwrap();
        copy.assert_fails(&[expected]);
    }
    let copy = Copy::of("c", &FORWARD);
    std::fs::write(copy.path().join("config.json"), vec![b' '; (1 << 20) + 1]).unwrap();
    copy.assert_fails(&["longer than 1048576 bytes"]);
    // Once, though two routings cannot be compared without it.
    let without = Copy::of("small", &["params.safetensors", "forward.safetensors", "sublayer_forward.safetensors"]);
    without.assert_fails(&["model: config.json is missing"]);
    #[cfg(unix)]
    {
        // Nobody ever writes to this pipe: opening it would wait for ever.
        let copy = Copy::of("c", &FORWARD[1..]);
        let made = std::process::Command::new("mkfifo").arg(copy.path().join("config.json")).status().unwrap();
        assert!(made.success());
        copy.assert_fails(&["config.json: cannot be read: it is not a regular file"]);
    }
}

#[test]
fn the_table_has_a_line_for_every_tensor_and_a_summary() {
    let report = check(&golden().join("schedules"));
    let text = report.to_string();
    assert_eq!(text.lines().count(), report.rows.len() + 2);
    assert!(text.lines().last().unwrap().starts_with("ok: "), "{text}");
    assert!(text.lines().skip(1).take(report.rows.len()).all(|line| line.ends_with("  ok")), "{text}");
}

/// Runs the program: exit code, standard output, standard error.
fn command(args: &[&Path]) -> (Option<i32>, String, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_dtr-fused")).arg("parity").args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn the_command_says_what_it_compared_and_its_exit_code_what_came_of_it() {
    let masks = golden().join("masks");
    let (code, out, err) = command(&[&masks, &golden().join("nll")]);
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.starts_with(&masks.display().to_string()), "only results are on standard output: {out}");
    assert!(out.lines().last().unwrap().starts_with("ok: ") && out.contains("in 2 cases"), "{out}");

    let copy = Copy::of("masks", &["masks.safetensors"]);
    copy.put("masks.safetensors", "C96_beta0.5_alpha4.start", &1i32.to_le_bytes());
    let (code, out, err) = command(&[Path::new("--quiet"), &masks, copy.path()]);
    assert_eq!(code, Some(1), "{out}{err}");
    assert_eq!(out.lines().filter(|line| line.starts_with('!')).count(), 1, "{out}");
    assert!(err.contains("1 of 2 cases do not agree"), "{err}");

    let (code, _, err) = command(&[Copy::of("c", &[]).path()]);
    assert_eq!(code, Some(1), "{err}");
    let (code, _, err) = command(&[Path::new("no/such/directory")]);
    let errors = err.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!((code, errors), (Some(1), 1), "{err}");
    for bad in [&["--precision", "f8"][..], &["--device", "cuda:9"]] {
        let args: Vec<&Path> = bad.iter().map(Path::new).chain([masks.as_path()]).collect();
        assert_eq!(command(&args).0, Some(2));
    }
    assert_eq!(command(&[]).0, Some(2));
}
