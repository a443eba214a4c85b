//! Files of weights: what ours say of the model beside its tensors, those that a run starts from, and the model that a file alone
//! tells of.

use std::path::Path;

use super::checkpoint::{self, Metadata};
use super::config::{Assignment, DataKind, InitLabels, Layer, TrainConfig};
use super::learner::Learner;
use super::state::{names_of_classes, other_class, told_names};
use crate::data::Dataset;
use crate::diffusion::Prediction;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::dit::Dit;
use crate::model::embed::position_embedding;
use crate::routing::Routing;
use crate::safetensors_file::SafetensorsFile;

/// The fixed table of positions, `[1, T, C]`, which is no parameter.
pub(crate) const POSITIONS: &str = "pos_embed";

/// The table of labels, `[classes + 1, C]`: the last row is that of no class.
const LABELS: &str = "y_embedder.embedding_table.weight";

/// The weight of the last layer, `[P * P * outputs, C]`.
const LAST: &str = "final_layer.linear.weight";

/// Most that positions may differ from ours, which are at most 1: in bf16 they do by 0.004.
const POSITIONS_DIFFER: f32 = 0.01;

/// Knobs that no shape of a tensor shows, though with another value the same weights are another model.
const UNSEEN: [&str; 7] = ["num_heads", "routing", "beta", "alpha", "seed", "schedule", "prediction"];

/// Knobs that matter when weights are sampled or validated, and not when others start from them.
const OF_SAMPLES: [&str; 4] = ["data_kind", "label_dropout", "precision", "loss_weight"];

/// What a file of weights says of the model.
pub(super) fn metadata(config: &TrainConfig) -> Metadata {
    let used = |knob: &&str| match *knob {
        "beta" | "alpha" if config.routing == Routing::Dense => false,
        "seed" => config.routing == Routing::Random,
        "schedule" => config.prediction != Prediction::Flow,
        _ => true,
    };
    let knobs = UNSEEN.into_iter().filter(used).chain(OF_SAMPLES);
    knobs.map(|knob| (knob.to_string(), text_of(config, knob))).collect()
}

/// Whether a file of this program wrote this: others may have a seed there, or a schedule of something else.
fn is_ours(metadata: &Metadata) -> bool {
    let has = |knob: &&str| metadata.contains_key(*knob);
    ["num_heads", "routing"].iter().all(has) && ["schedule", "prediction"].iter().any(has)
}

/// What `file` says. Ours did not say what they predict when that was always the noise.
fn said_by(file: &SafetensorsFile) -> Metadata {
    let mut said = file.metadata().clone();
    if is_ours(&said) {
        said.entry("prediction".into()).or_insert_with(|| Prediction::Noise.to_string());
    }
    said
}

/// What of `metadata` tells a model from another of the same shapes, as a sentence lists it.
fn told(metadata: &Metadata) -> String {
    let told = UNSEEN.iter().filter_map(|knob| Some(format!("{knob} {}", metadata.get(*knob)?)));
    told.collect::<Vec<_>>().join(", ")
}

fn text_of(config: &TrainConfig, knob: &str) -> String {
    config.toml_of(knob).trim_matches('"').to_string()
}

/// Puts the weights of `init_from`, if there are any, in the place of those that were drawn, and says where they come from and what
/// is another in this run, which learns from `data`.
///
/// # Errors
/// As [`read_weights`], and when their model had another number of heads.
pub(super) fn start_from_given_weights(
    config: &TrainConfig,
    learner: &mut Learner,
    data: &dyn Dataset,
) -> Result<Option<String>> {
    if config.init_from.is_empty() {
        return Ok(None);
    }
    let path = Path::new(&config.init_from);
    if path.is_dir() {
        let checkpoint = checkpoint::resolve(path).ok().and_then(|place| place.checkpoint);
        let file = checkpoint.unwrap_or_else(|| path.into()).join(checkpoint::EMA);
        return Err(Error::file(path, format!("is a directory: give a file of weights, such as {}", file.display())));
    }
    let file = SafetensorsFile::open(path)?;
    let (Learner { dit, weights, .. }, new) = (&mut *learner, config.init_labels == InitLabels::New);
    let read = if new { read_all_but_labels(&file, dit, weights) } else { read_all(&file, dit, weights) };
    read.map_err(|error| match file.get(LABELS).map(|table| table.shape) {
        Some(&[rows, _]) if !new && rows != dit.config.num_classes + 1 && error.to_string().contains(LABELS) => {
            error.and("; to learn other classes, give --init-labels new")
        }
        _ => error,
    })?;
    let names = [told_names(file.metadata()), names_of_classes(data).map(<[String]>::to_vec)];
    let labels = match other_class(names) {
        _ if new => ", with new labels".into(),
        Some((class, [was, is])) if !config.no_classes() => {
            format!(", whose class {class} was {was}, and is {is} in these data (--init-labels new draws all anew)")
        }
        _ => String::new(),
    };
    let note = differences(config, dit, &file)?;
    learner.ema.copy_from_slice(&learner.weights);
    learner.push()?;
    Ok(Some(format!("starting from the weights in {}{labels}{note}", path.display())))
}

/// As [`read_all`], but of the table of labels only the last row, which may be one of another number of rows.
fn read_all_but_labels(file: &SafetensorsFile, dit: &Dit, buffer: &mut [f32]) -> Result<()> {
    check_tensors(file, dit)?;
    for entry in dit.layout.entries() {
        let to = &mut buffer[entry.param.range()];
        if entry.name != LABELS {
            checkpoint::read_tensor(file, &entry.name, &entry.shape, to)?;
            continue;
        }
        let (rows, width) = (file.tensor(LABELS)?.shape.first().copied().unwrap_or(0), dit.config.hidden_size);
        let mut table = vec![0.0; file.tensor(LABELS)?.elements()];
        checkpoint::read_tensor(file, LABELS, &[rows.max(1), width], &mut table)?;
        let (of_no_class, from) = (to.len() - width, table.len() - width);
        to[of_no_class..].copy_from_slice(&table[from..]);
    }
    Ok(())
}

/// What of the model of the weights in `file` is another in `config`.
fn differences(config: &TrainConfig, dit: &Dit, file: &SafetensorsFile) -> Result<String> {
    let (was, is) = (&said_by(file), metadata(config));
    if let Some(heads) = was.get("num_heads").filter(|&heads| *heads != is["num_heads"]) {
        let what = format!("has the weights of a model with {heads} heads: give --num-heads {heads}");
        return Err(Error::file(file.path(), what));
    }
    let mut notes = String::new();
    if let Some(tokens) =
        file.get(POSITIONS).map(|tensor| tensor.shape[1]).filter(|&tokens| tokens != dit.config.tokens())
    {
        notes += &format!(", which were trained on images of {tokens} tokens; these have {}", dit.config.tokens());
    }
    if !is_ours(was) {
        notes += &format!(
            "; they do not say how they were trained, and go on with {} (published DiT weights: routing dense, schedule linear)",
            told(&is)
        );
    } else if UNSEEN.iter().any(|knob| was.get(*knob) != is.get(*knob)) {
        notes +=
            &format!("; they were trained with {}, and go on with {}: another model at first", told(was), told(&is));
    }
    Ok(notes)
}

/// What may be said of a file of weights, in the order in which it is listed.
fn settable() -> impl Iterator<Item = &'static str> {
    UNSEEN.into_iter().chain(OF_SAMPLES).chain(["image_size"])
}

/// The configuration of the model whose weights are in `file`, with the keys of `set` over what the file tells, and a sentence on what
/// was assumed or is said otherwise.
///
/// Sizes are those of the tensors. The rest is written in files of this program; of others it is that of the published DiT weights
/// (dense, linear schedule, their heads).
///
/// # Errors
/// When the tensors are not those of a DiT, `set` gives what they tell, or neither tells what cannot be assumed: the size of the images,
/// the heads of a model that was not published, and what a file of this program should say.
pub fn config_of(file: &SafetensorsFile, set: &Layer) -> Result<(TrainConfig, Option<String>)> {
    if let Some(given) = set.assignments.iter().find(|given| settable().all(|key| given.key != key)) {
        let keys: Vec<&str> = settable().collect();
        return Err(Error::usage(format!(
            "{} gives '{}', but for a file of weights it takes {}",
            set.origin,
            given.key,
            keys.join(", ")
        )));
    }
    let assignment = |key: &str, text: &str| Assignment { key: key.into(), text: text.into() };
    let published = vec![assignment("routing", "dense"), assignment("schedule", "linear")];
    let mut of_file = shapes_of(file)?;
    let (said, ours) = (said_by(file), is_ours(file.metadata()));
    if ours {
        let said = UNSEEN.into_iter().chain(OF_SAMPLES).filter_map(|knob| said.get_key_value(knob));
        of_file.extend(said.map(|(knob, text)| assignment(knob, text)));
    } else if let Some(heads) = said.get("num_heads") {
        of_file.push(assignment("num_heads", heads));
    }
    let layers = [("the published weights", published), (&file.path().display().to_string(), of_file)]
        .map(|(origin, assignments)| Layer { origin: origin.into(), assignments });
    let layers = [&layers[..], std::slice::from_ref(set)].concat();
    let told = |key: &str| layers[1..].iter().rev().find_map(|layer| layer.last(key));
    let missing = |key: &str| {
        Err(Error::file(file.path(), format!("does not tell {key}: give --set {key}=X to sample or validate")))
    };
    if told("num_heads").or(told("model")).is_none() {
        return missing("num_heads");
    }
    match told("image_size") {
        None => return missing("image_size"),
        Some("0") => return Err(Error::usage("image_size is 0, but it must be at least 1")),
        _ => {}
    }
    let mut used = layers.clone();
    // What is said otherwise may be anything in the file.
    used[1].assignments.retain(|assignment| set.last(&assignment.key).is_none());
    let mut config = TrainConfig::from_layers(&used).map_err(|error| match error {
        Error::Usage(what) if set.assignments.is_empty() => Error::file(file.path(), what),
        Error::Usage(what) => Error::usage(format!("{what}, for the weights in {}", file.path().display())),
        other => other,
    })?;
    let (dense, flow) = (config.routing == Routing::Dense, config.prediction == Prediction::Flow);
    let none = "routing is dense, which has none: give routing=paper too, or leave it out";
    let unused =
        [("beta", dense, none), ("alpha", dense, none), ("schedule", flow, "a flow has its own: leave it out")];
    if let Some((key, _, why)) = unused.into_iter().find(|(key, unused, _)| *unused && set.last(key).is_some()) {
        return Err(Error::usage(format!("{} gives {key}, but {why}", set.origin)));
    }
    config.data_kind = if config.are_images() { DataKind::Images } else { DataKind::Latents };
    let mut assumed = metadata(&config);
    assumed.retain(|key, _| told(key).is_none());
    if let Some(key) = UNSEEN.iter().find(|&&key| ours && assumed.contains_key(key)) {
        return missing(key);
    }
    // In which format products are is no part of the model.
    assumed.remove("precision");
    let note = note_on(&config, &assumed, &layers[1], set).map(|note| format!("{} {note}", file.path().display()));
    Ok((config, note))
}

/// What is to be said of a file of weights when something was assumed, or `set` gives something else than the file.
fn note_on(config: &TrainConfig, assumed: &Metadata, file: &Layer, set: &Layer) -> Option<String> {
    let list = |knobs: Vec<(&str, &str)>| {
        knobs.iter().map(|(key, text)| format!("{key} {text}")).collect::<Vec<_>>().join(", ")
    };
    let assumed = list(settable().filter_map(|key| Some((key, assumed.get(key)?.as_str()))).collect());
    let replaced = settable().filter_map(|key| Some((key, file.last(key).filter(|_| set.last(key).is_some())?)));
    // What counts is the value: 4 is 4.0.
    let replaced = list(replaced.filter(|(key, said)| *said != text_of(config, key)).collect());
    let mut notes = Vec::new();
    if !assumed.is_empty() {
        notes.push(format!(
            "does not say {assumed}: this is assumed (--set KEY=VALUE of sample or validate says otherwise)"
        ));
    }
    if !replaced.is_empty() {
        notes.push(format!("says {replaced}, and {} otherwise", set.origin));
    }
    (!notes.is_empty()).then(|| notes.join("; it "))
}

/// The knobs that the shapes of the tensors tell.
fn shapes_of(file: &SafetensorsFile) -> Result<Vec<Assignment>> {
    fn shape<const RANK: usize>(file: &SafetensorsFile, name: &str) -> Result<[usize; RANK]> {
        let shape = file.tensor(name)?.shape;
        let fits = <[usize; RANK]>::try_from(shape).ok().filter(|shape| !shape.contains(&0));
        fits.ok_or_else(|| as_in_no_dit(file, name, shape))
    }
    const FIRST: &str = "x_embedder.proj.weight";
    if file.get(FIRST).is_none()
        && let Some(name) = file.names().find(|name| name.ends_with(&format!(".{FIRST}")))
    {
        let why = checkpoint::why_prefixed(&name[..name.len() - FIRST.len()]);
        return Err(Error::file(file.path(), format!("holds tensor '{name}', where a model has '{FIRST}': {why}")));
    }
    if let Some(name) = file.names().find(|name| checkpoint::is_of_diffusers(name)) {
        return Err(Error::file(file.path(), format!("holds tensor '{name}': {}", checkpoint::OF_DIFFUSERS)));
    }
    let [hidden, channels, patch, _] = shape(file, FIRST)?;
    let [rows, width] = shape(file, LABELS)?;
    // A class, and no class.
    if rows < 2 {
        return Err(as_in_no_dit(file, LABELS, &[rows, width]));
    }
    let [mlp, _] = shape(file, "blocks.0.mlp.fc1.weight")?;
    let depth = (0..).take_while(|block| file.get(&format!("blocks.{block}.mlp.fc1.weight")).is_some()).count();
    // A size of the MLP that is no simple multiple must survive the way back from its share.
    let share = mlp as f64 / hidden as f64;
    let share = if (hidden as f64 * share) as usize == mlp { share } else { (mlp as f64 + 0.5) / hidden as f64 };
    let mut knobs = vec![
        ("hidden_size", hidden.to_string()),
        ("depth", depth.to_string()),
        ("patch_size", patch.to_string()),
        ("mlp_ratio", share.to_string()),
        ("in_channels", channels.to_string()),
        ("num_classes", (rows - 1).to_string()),
    ];
    // Other numbers are refused when it is read.
    let [outputs, _] = shape(file, LAST)?;
    let of_answer = patch.checked_mul(patch).and_then(|pixels| pixels.checked_mul(channels));
    knobs.push(("learn_sigma", (Some(outputs) != of_answer).to_string()));
    let published = ["S", "B", "L", "XL"].map(|size| format!("DiT-{size}/{patch}")).into_iter();
    let same = |of: ModelConfig| of.hidden_size == hidden && of.depth == depth;
    // Its name brings its heads.
    knobs
        .extend(published.map(|name| ("model", name)).find(|(_, name)| ModelConfig::published(name).is_some_and(same)));
    if let Some(positions) = file.get(POSITIONS) {
        let side = side_of(positions.shape, hidden).ok_or_else(|| as_in_no_dit(file, POSITIONS, positions.shape))?;
        knobs.push(("image_size", side.saturating_mul(patch).to_string()));
    }
    Ok(knobs.into_iter().map(|(key, text)| Assignment { key: key.into(), text }).collect())
}

fn as_in_no_dit(file: &SafetensorsFile, name: &str, shape: &[usize]) -> Error {
    Error::file(file.path(), format!("tensor '{name}' has shape {shape:?}, as in no DiT"))
}

/// Patches on a side of the square images whose positions have this shape, in a model of `hidden` channels.
fn side_of(shape: &[usize], hidden: usize) -> Option<usize> {
    let &[1, tokens, width] = shape else { return None };
    let side = tokens.isqrt();
    (width == hidden && side > 0 && side * side == tokens).then_some(side)
}

/// Reads `model.safetensors` or `ema.safetensors` of a checkpoint, or weights from elsewhere with the same names, into `buffer`.
///
/// # Errors
/// When the file is missing, damaged or another model's, also one with learned positions.
///
/// # Panics
/// When `buffer` is not as long as the layout of the model.
pub fn read_weights(path: &Path, dit: &Dit, buffer: &mut [f32]) -> Result<()> {
    read_all(&SafetensorsFile::open(path)?, dit, buffer)
}

fn read_all(file: &SafetensorsFile, dit: &Dit, buffer: &mut [f32]) -> Result<()> {
    check_tensors(file, dit)?;
    checkpoint::read_layout(file, &dit.layout, "", buffer)
}

/// Refuses tensors that the model does not have, and other positions.
fn check_tensors(file: &SafetensorsFile, dit: &Dit) -> Result<()> {
    checkpoint::check_names(file, &dit.layout, &[""], &[POSITIONS])?;
    check_positions(file, dit)
}

/// Positions, where they are given, must be ours; those of another size of images may go with the same weights.
fn check_positions(file: &SafetensorsFile, dit: &Dit) -> Result<()> {
    let Some(tensor) = file.get(POSITIONS) else { return Ok(()) };
    let c = dit.config.hidden_size;
    let side = side_of(tensor.shape, c).unwrap_or(dit.config.input_size / dit.config.patch_size);
    let mut given = vec![0.0; side * side * c];
    checkpoint::read_tensor(file, POSITIONS, &[1, side * side, c], &mut given)?;
    let apart = |ours: &[f32]| given.iter().zip(ours).fold(0.0, |most: f32, (a, b)| most.max((a - b).abs()));
    let apart =
        if side * side == dit.config.tokens() { apart(dit.positions()) } else { apart(&position_embedding(side, c)) };
    if apart > POSITIONS_DIFFER {
        return Err(Error::file(
            file.path(),
            format!(
                "tensor '{POSITIONS}' is up to {apart:.2} away from the sines and cosines of DiT, which are fixed here: a model that \
                 learned its positions cannot be used"
            ),
        ));
    }
    Ok(())
}
