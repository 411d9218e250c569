use std::path::Path;

use super::*;
use crate::application::Outline;

const LIGHT: &str = "dirty-set = \"1124MB\"\nmax-dirty-rate = \"2MB/s\"\ndirty-rate = \"1MB/s\"\n";
const DATABASE: &str =
    "dirty-set = \"2048MB\"\nmax-dirty-rate = \"15MB/s\"\ndirty-rate = \"7.5MB/s\"\n";

/// A file that names neither hosts nor sockets.
fn file(vms: &[&str], traffic: &[(usize, usize, u32)]) -> String {
    let mut text =
        "version = 1\n[application]\nname = \"shop\"\nbandwidth = \"32MB/s\"\n".to_owned();
    for (index, vm) in vms.iter().enumerate() {
        text += &format!("[[vm]]\nname = \"vm{index}\"\n{vm}");
    }
    for (a, b, rate) in traffic {
        text += &format!("[[traffic]]\nbetween = [\"vm{a}\", \"vm{b}\"]\nrate = \"{rate}KB/s\"\n");
    }
    text
}

fn outline(text: &str) -> Outline {
    Outline::parse(text, Path::new("app.toml")).expect("good")
}

fn inputs(text: &str, stage: Stage) -> Inputs {
    Inputs::new(&outline(text), stage).expect("enough")
}

fn four() -> Inputs {
    let traffic = [(0, 1, 80), (1, 2, 50), (1, 3, 20), (2, 3, 30)];
    inputs(
        &file(&[LIGHT, LIGHT, DATABASE, DATABASE], &traffic),
        Stage::Two,
    )
}

fn plan(inputs: &Inputs, policy: Policy, search: Search) -> Plan {
    super::plan(inputs, policy, search).expect("found")
}

fn near(found: Option<f64>, expected: f64) -> bool {
    found.is_some_and(|found| (found - expected).abs() <= 1e-8 * expected.abs())
}

#[test]
fn stage_two_of_comma_is_exact() {
    let four = four();
    for (search, impact) in [
        (Search::Exact, 2.900_645_161e6),
        (Search::Brute, 2.900_645_161e6),
        (Search::Auto, 2.900_645_161e6),
        (Search::Heuristic, 4.179_591_837e6),
    ] {
        let plan = plan(&four, Policy::Comma, search);
        assert!(near(plan.impact_bytes, impact), "{search}: {plan:?}");
        assert_eq!(plan.optimal, search != Search::Heuristic);
    }
    let exact = plan(&four, Policy::Comma, Search::Exact);
    assert_eq!(exact.groups[0].vms, ["vm1", "vm2", "vm3"]);
    assert_eq!(exact.groups[1].vms, ["vm0"]);
    assert!(near(Some(exact.groups[1].duration_s), 36.258_064_516));
    assert_eq!(exact.groups[1].start_s, exact.groups[0].duration_s);
    let sequential = plan(&four, Policy::Sequential, Search::Auto);
    assert!(near(sequential.impact_bytes, 12.931_665_569e6));
}

#[test]
fn five_vms_of_the_paper() {
    let traffic = [(0, 1, 80), (0, 2, 60), (1, 3, 50), (2, 4, 40), (3, 4, 70)];
    let text = file(&[LIGHT, LIGHT, LIGHT, DATABASE, DATABASE], &traffic);
    let five = inputs(&text, Stage::Two);
    let exact = plan(&five, Policy::Comma, Search::Exact);
    assert!(near(exact.impact_bytes, 7.976_774_193e6));
    let heuristic = plan(&five, Policy::Comma, Search::Heuristic);
    assert!(near(heuristic.impact_bytes, 10.139_755_284e6));
}

#[test]
fn two_databases_and_more_do_not_converge_at_once() {
    let plan = plan(&four(), Policy::Parallel, Search::Auto);
    assert!(!plan.converges && plan.completion_s.is_none());
    let reason = plan.reason.expect("said");
    assert!(
        reason.contains("34.0 MB/s") && reason.contains("32.0 MB/s"),
        "{reason}"
    );
}

#[test]
fn a_vm_that_does_not_converge_is_named() {
    let fast = "dirty-set = \"1GB\"\nmax-dirty-rate = \"40MB/s\"\n";
    let both = inputs(&file(&[LIGHT, fast], &[]), Stage::Two);
    for policy in [Policy::Sequential, Policy::Comma] {
        let plan = plan(&both, policy, Search::Auto);
        let reason = plan.reason.expect("said");
        assert!(reason.contains("VM vm1 does not converge"), "{reason}");
        assert!(reason.contains("up to 40.0 MB/s"), "{reason}");
    }
    // On average it does, and a hold waits for a good moment.
    assert!(plan(&both, Policy::Muster, Search::Auto).converges);
    let faster = fast.replace("40MB/s", "60MB/s");
    let both = inputs(&file(&[LIGHT, &faster], &[]), Stage::Two);
    let stuck = plan(&both, Policy::Muster, Search::Auto);
    assert!(stuck.reason.expect("said").contains("VM vm1"));
}

#[test]
fn muster_needs_no_groups_where_the_mean_dirty_rates_fit() {
    let four = four();
    let [muster, lll, oba] = [Policy::Muster, Policy::Lll, Policy::Vmbuddies]
        .map(|policy| plan(&four, policy, Search::Auto));
    assert_eq!((muster.groups.len(), muster.impact_bytes), (1, Some(0.0)));
    assert!(muster.completion_s <= lll.completion_s && muster.completion_s < oba.completion_s);
    // Too hot for one group: fewer bytes cross than with groups of one.
    let hot = "dirty-set = \"1GB\"\nmax-dirty-rate = \"15MB/s\"\ndirty-rate = \"14MB/s\"\n";
    let traffic = [(0, 1, 80), (1, 2, 50), (0, 2, 20)];
    let hot = inputs(&file(&[hot; 3], &traffic), Stage::Two);
    let [muster, sequential] =
        [Policy::Muster, Policy::Sequential].map(|policy| plan(&hot, policy, Search::Auto));
    assert_eq!(muster.groups.len(), 2, "{muster:?}");
    assert!(muster.optimal && muster.impact_bytes < sequential.impact_bytes);
}

#[test]
fn what_is_missing_is_named_for_every_vm() {
    let text = file(&["memory = \"1GiB\"\n", "dirty-rate = \"1MB/s\"\n"], &[]);
    let missing = |stage| {
        Inputs::new(&outline(&text), stage)
            .expect_err("too little")
            .problems
    };
    assert_eq!(
        missing(Stage::Whole),
        [
            "VM vm0: give `dirty-rate` or `max-dirty-rate` (better both)",
            "VM vm1: `memory` is missing",
        ]
    );
    assert_eq!(
        missing(Stage::Two)[1],
        "VM vm1: stage two needs `dirty-set`"
    );
    let replicas = text.replace("name = \"shop\"", "name = \"shop\"\nreplica-groups = true");
    let missing = Inputs::new(&outline(&replicas), Stage::Two).expect_err("no tiers");
    assert!(
        missing.problems[2].contains("`tier` is missing"),
        "{missing}"
    );
}

const WEB: &str = "memory = \"1000MB\"\ndirty-rate = \"2MB/s\"\n";
const HOT: &str = "memory = \"1000MB\"\ndirty-rate = \"12MB/s\"\nmax-dirty-rate = \"13MB/s\"\nwritable-working-set = \"30MB\"\n";

/// Every plan: nothing above the bandwidth, everything sent, times in order.
fn check(inputs: &Inputs, plan: &Plan) {
    assert!(plan.converges, "{plan:?}");
    let completion = plan.completion_s.expect("converges");
    assert_eq!(plan.vms.len(), inputs.vms.len());
    for (vm, input) in plan.vms.iter().zip(&inputs.vms) {
        assert!(vm.start_s >= 0.0 && vm.start_s <= vm.finish_s && vm.finish_s <= completion);
        assert!(vm.bandwidth.is_sorted_by(|a, b| a.0 <= b.0), "{vm:?}");
        assert_eq!(vm.bandwidth[0].0, vm.start_s);
        let sent = sent(vm);
        assert!(
            sent >= input.load.left_bytes.min(input.cap) * (1.0 - 1e-9),
            "{sent} of {input:?}"
        );
    }
    for part in 0..200 {
        let at = completion * (f64::from(part) + 0.5) / 200.0;
        let running = plan.vms.iter().filter(|vm| vm.finish_s > at);
        let rates = running.filter_map(|vm| vm.bandwidth.iter().rev().find(|step| step.0 <= at));
        let sum: f64 = rates.map(|step| step.1).sum();
        assert!(
            sum <= inputs.limits.bandwidth * (1.0 + 1e-9),
            "{} at {at}: {sum}",
            plan.policy
        );
    }
    let mut named: Vec<&String> = plan.groups.iter().flat_map(|group| &group.vms).collect();
    named.sort();
    assert_eq!(named.len(), plan.vms.len());
    named.dedup();
    assert_eq!(named.len(), plan.vms.len());
}

#[test]
fn every_policy_of_a_whole_migration() {
    let disk =
        "memory = \"500MB\"\ndisk = \"2GB\"\ndirty-rate = \"1MB/s\"\ndirty-set = \"100MB\"\n";
    let inputs = inputs(
        &file(&[WEB, HOT, disk], &[(0, 1, 100), (1, 2, 10)]),
        Stage::Whole,
    );
    let plans = Policy::ALL.map(|policy| plan(&inputs, policy, Search::Auto));
    for plan in &plans {
        check(&inputs, plan);
    }
    let muster = plans.last().expect("six");
    let completion = |plan: &Plan| plan.completion_s.expect("converges");
    for plan in plans
        .iter()
        .filter(|plan| ["lll", "vmbuddies"].contains(&plan.policy.as_str()))
    {
        assert!(
            completion(muster) <= completion(plan) * (1.0 + 1e-9),
            "{}",
            plan.policy
        );
        assert_eq!(plan.impact_bytes, Some(0.0));
    }
    assert!(plans[0].impact_bytes > Some(0.0));
}

#[test]
fn saturating_working_sets_are_for_oba_and_the_rest_for_lll() {
    let hot = inputs(&file(&[HOT, HOT], &[]), Stage::Whole);
    let [lll, oba] = [Policy::Lll, Policy::Vmbuddies].map(|policy| {
        let plan = plan(&hot, policy, Search::Auto);
        (plan.completion_s, plan.traffic_bytes)
    });
    assert!(oba.0 <= lll.0 && oba.1 <= lll.1, "{oba:?} {lll:?}");
    let calm = inputs(&file(&[WEB, WEB], &[]), Stage::Whole);
    let [lll, oba] = [Policy::Lll, Policy::Vmbuddies]
        .map(|policy| plan(&calm, policy, Search::Auto).completion_s);
    assert!(lll < oba, "{lll:?} {oba:?}");
}

#[test]
fn interfaces_limit_those_that_pass_them() {
    let hosts = "[[host]]\nname = \"a\"\nnic = \"10MB/s\"\n[[host]]\nname = \"b\"\n";
    let on_a = format!("{WEB}from = \"a\"\nto = \"b\"\n");
    let text = file(&[&on_a, WEB], &[]).replace(
        "[[vm]]\nname = \"vm0\"",
        &format!("{hosts}[[vm]]\nname = \"vm0\""),
    );
    let inputs = inputs(&text, Stage::Whole);
    for policy in Policy::ALL {
        let plan = plan(&inputs, policy, Search::Auto);
        check(&inputs, &plan);
        let [limited, _] = &plan.vms[..] else {
            panic!("two VMs");
        };
        assert!(
            limited
                .bandwidth
                .iter()
                .all(|step| step.1 <= 10e6 * (1.0 + 1e-9)),
            "{plan:?}"
        );
    }
}

#[test]
fn replica_groups_keep_every_tier_on_both_sites() {
    let vm = |tier: &str| format!("tier = \"{tier}\"\n{DATABASE}");
    let [web, db] = ["web", "db"].map(vm);
    let traffic = [(0, 1, 9), (2, 3, 5), (1, 2, 7)];
    let text = file(&[&web, &web, &db, &db], &traffic)
        .replace("name = \"shop\"", "name = \"shop\"\nreplica-groups = true");
    let inputs = inputs(&text, Stage::Two);
    let plan = plan(&inputs, Policy::Comma, Search::Auto);
    let ends = [plan.groups.first(), plan.groups.last()];
    for group in ends.into_iter().flatten() {
        let is = |names: [&str; 2]| group.vms.iter().any(|vm| names.contains(&vm.as_str()));
        assert!(is(["vm0", "vm1"]) && is(["vm2", "vm3"]), "{plan:?}");
    }
}

#[test]
fn the_json_form_has_its_fields() {
    let plan = plan(&four(), Policy::Comma, Search::Exact);
    let json = serde_json::to_value(&plan).expect("JSON");
    for field in [
        "policy",
        "groups",
        "vms",
        "completion_s",
        "traffic_bytes",
        "downtime_s",
        "impact_bytes",
        "optimal",
    ] {
        assert!(!json[field].is_null(), "{field} in {json}");
    }
    assert_eq!(json["vms"][0]["bandwidth"][0][1], 32e6);
    assert!(
        json["groups"][0]["start_s"].is_number() && json["groups"][0]["duration_s"].is_number()
    );
}

/// Working sets of a sixteenth of the memory, written without a pause: 36 of 47 MB/s are dirtied.
fn hot_set(keys: &str) -> String {
    let vm = |memory, rate, set| {
        format!(
            "memory = \"{memory}MiB\"\ndirty-rate = \"{rate}MB/s\"\nmax-dirty-rate = \"{rate}MB/s\"\n\
             writable-working-set = \"{set}MiB\"\n"
        )
    };
    let vms = [vm(64, 8, 4), vm(96, 12, 6), vm(160, 16, 10)];
    file(&[&vms[0], &vms[1], &vms[2]], &[])
        .replace("32MB/s", "47MB/s")
        .replace("name = \"shop\"", &format!("name = \"shop\"\n{keys}"))
}

#[test]
fn small_hot_working_sets_cost_little_more_than_the_memory() {
    let hot = inputs(&hot_set(""), Stage::Whole);
    // Once is 335.5 MB, 7.14 s; all working sets are 21 MB, 0.45 s.
    let once = 335.5e6 / 47e6;
    for policy in [Policy::Muster, Policy::Parallel, Policy::Vmbuddies] {
        let plan = plan(&hot, policy, Search::Auto);
        check(&hot, &plan);
        let completion = plan.completion_s.expect("converges");
        assert!(
            completion > once && completion < once * 1.25,
            "{policy}: {completion}"
        );
    }
    // What is ready early, and held, is sent again and again.
    let lll = plan(&hot, Policy::Lll, Search::Auto);
    assert!(lll.completion_s > Some(once * 1.25), "{lll:?}");
}

#[test]
fn a_deadline_is_met_or_missed_by_so_much() {
    let of = |keys: &str| {
        let inputs = inputs(&hot_set(keys), Stage::Whole);
        plan(&inputs, Policy::Muster, Search::Auto)
    };
    assert_eq!(of("").deadline, None);
    let met = of("deadline = \"20s\"");
    let deadline = met.deadline.expect("given");
    assert!(
        deadline.met && deadline.needed_s == met.groups[0].duration_s,
        "{deadline:?}"
    );
    assert_eq!(met.notes, of("").notes);
    let missed = of("deadline = \"7200ms\"");
    assert!(!missed.deadline.expect("given").met);
    let note = missed.notes.last().expect("said");
    assert!(
        note.starts_with("the deadline of 7 s is missed by"),
        "{note}"
    );
    // Less than once takes, nothing helps; a little more, slowing does.
    let keys = |deadline: &str, rest: &str| {
        format!("deadline = \"{deadline}\"\non-non-convergence = \"throttle\"\n{rest}")
    };
    let note = |keys: &str| of(keys).notes.last().cloned().unwrap_or_default();
    let helped = note(&keys("7500ms", ""));
    assert!(
        helped.contains("it is met with vCPUs slowed by"),
        "{helped}"
    );
    assert!(note(&keys("7500ms", "max-throttle = 1")).ends_with("does not help"));
    assert!(note(&keys("5s", "")).ends_with("does not help"));
}

#[test]
fn what_does_not_converge_may_do_so_when_it_is_slowed() {
    let text = file(&["memory = \"1GB\"\ndirty-rate = \"40MB/s\"\n"], &[]);
    let text = text.replace(
        "name = \"shop\"",
        "name = \"shop\"\non-non-convergence = \"throttle\"",
    );
    let found = plan(&inputs(&text, Stage::Whole), Policy::Muster, Search::Auto);
    assert!(!found.converges);
    let note = found.notes.last().expect("said");
    assert_eq!(note, "it converges with vCPUs slowed by 40 %");
}

#[test]
fn the_reserve_comes_off_links_and_interfaces_too() {
    let hosts = "[[host]]\nname = \"a\"\nnic = \"10MB/s\"\n[[host]]\nname = \"b\"\n\
                 [[link]]\nbetween = [\"a\", \"b\"]\nrate = \"9MB/s\"\n";
    let vm = format!("{WEB}from = \"a\"\nto = \"b\"\n");
    let text = file(&[&vm], &[])
        .replace("[[vm]]", &format!("{hosts}[[vm]]"))
        .replace("name = \"shop\"", "name = \"shop\"\nreserve = \"2MB/s\"");
    let inputs = inputs(&text, Stage::Whole);
    let rates: Vec<f64> = inputs.limits.cuts.iter().map(|cut| cut.rate).collect();
    assert_eq!((inputs.limits.bandwidth, rates), (30e6, vec![7e6, 8e6]));
    let all = text.replace("reserve = \"2MB/s\"", "reserve = \"9MB/s\"");
    let error = Outline::parse(&all, Path::new("app.toml")).expect_err("nothing is left");
    assert!(
        error
            .to_string()
            .contains("leaves nothing of [[link]] between `a` and `b`"),
        "{error}"
    );
}
