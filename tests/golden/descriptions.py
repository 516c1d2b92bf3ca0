"""The objectives as read in the libraries' source; they travel in the `meta` of each file.

`stop(.)` is detached; `[.]` is 1 where true; sums over b are over the batch, i over features, d
over columns. Where no other `pre` is given, `pre = x W_enc.T + b_enc`.
"""

MSE = "mse = mean_b sum_d (x_hat - x)^2"

SAELENS_AUX = """aux = c scale mean_b sum_d (sum_{i in A_b} pre_bi W_dec_i - stop(x - x_hat))^2 with
    A_b = the min(d//2, n_dead) dead features with the largest pre, no ReLU;
    scale = min(n_dead / (d//2), 1); c = aux_loss_coefficient; no division by a variance"""

DL_AUX = """aux = mean_b sum_d (stop(e) - sum_{i in A_b} relu(pre_bi) W_dec_i)^2 / mean_b sum_d
    (stop(e) - mean over the batch of stop(e))^2 with e = x - x_hat;
    A_b = the min(d//2, n_dead) dead features with the largest relu(pre); computed in float32"""

DL_TOPK = f"""loss = l2 + auxk_alpha aux; l2 = mean_b sum_d (x - x_hat)^2;
    pre = (x - b_dec) W_enc.T + b_enc; {DL_AUX}"""

DL_UPDATE = """update: gradient of W_dec minus its part along r = w / (|w| + 1e-6) of each row w;
    then all gradients times min(1, 1 / (norm + 1e-6)) with the norm over all parameters; Adam;
    rows of W_dec / (|w| + 2.2e-16). The learning rate is constant here (warmup_steps = 0);
    at step 0, not here, b_dec would first become the geometric median of the batch"""

FORMULAS = {
    "saelens_topk": f"""loss = mse + aux; {MSE}; z = relu(pre) at the k largest pre of a token;
        centred: pre = (x - b_dec) W_enc.T + b_enc; {SAELENS_AUX}""",
    "saelens_batchtopk": f"""loss = mse + aux; {MSE}; z = relu(pre) at the int(k B) largest of the
        batch; {SAELENS_AUX}; threshold <- (1 - lr) threshold + lr min {{z > 0}} in float64,
        lr = topk_threshold_lr = 0.01""",
    "saelens_matryoshka": f"""loss = mse + sum_{{w in widths but the last}} inner_w + aux; {MSE};
        inner_w = mean_b sum_d (b_dec + z[:, :w] W_dec[:w] - x)^2, a sum over levels and not a mean;
        z as in BatchTopK; {SAELENS_AUX}. level_aux: the sum over levels of such terms, each with
        the dead features of that level alone (for A_b, scale) and the residual of the
        reconstruction up to and with that level""",
    "saelens_jumprelu": f"""loss = mse + l0_loss (+ pre_act_loss); {MSE}; z = pre [pre > theta].
        step: l0_loss = c mean_b l0_b, l0_b = sum_i [pre_bi > theta_i].
        quadratic: l0_loss = c mean_b 2/L (l0_b - L)^2, per token.
        tanh: l0_loss = c mean_b sum_i tanh(s z_bi |W_dec_i|).
        pre_act_loss = p mean_b sum_{{i dead}} relu(theta_i - pre_bi) |W_dec_i|. Nothing detached.
        Estimators with R = [|pre - theta| < bw/2]: dz/dtheta = -theta/bw R; dz/dpre = [pre > theta]
        (+ theta/bw R with ste_to_input); d[pre > theta]/dtheta = -1/bw R; d[pre > theta]/dpre = 0
        (+ 1/bw R with ste_to_input). theta is kept in float32 and clamped to >= 0 before a step""",
    "saelens_gated": f"""loss = mse + l1_loss + aux; {MSE}; pi = x W_enc.T + b_gate;
        z = [pi > 0] relu(x (exp(r_mag) W_enc).T + b_mag);
        l1_loss = c mean_b sum_i relu(pi_bi) |W_dec_i|;
        aux = mean_b sum_d (relu(pi) W_dec + b_dec - x)^2. Nothing detached: all three terms train
        W_dec, and b_dec is trained by mse and aux""",
    "saelens_standard": f"""loss = mse + l1_loss; {MSE}; z = relu(pre);
        l1_loss = c mean_b sum_i z_bi |W_dec_i|; the norm is differentiated too""",
    "dl_topk": f"""{DL_TOPK}; z = relu(pre) at the k largest of a token; threshold (float32) <-
        beta threshold + (1 - beta) mean_b min_i {{z_bi > 0}}; {DL_UPDATE}""",
    "dl_batchtopk": f"""{DL_TOPK}; z = relu(pre) at the k B largest of the batch; threshold
        (float32) <- beta threshold + (1 - beta) min {{z > 0}}; {DL_UPDATE}""",
    "dl_matryoshka": f"""loss = (1/G) sum_g weight_g mean_b sum_d (x - x_hat_g)^2 + auxk_alpha aux;
        x_hat_g = b_dec + the features of groups 0..g; weight_g = 1/G by default, so that
        the default divides by G twice; pre = (x - b_dec) W_enc.T + b_enc; z as in BatchTopK,
        over all groups; {DL_AUX}; e is that of the last group""",
    "dl_jumprelu": """loss = l2 + c (l0 / L - 1)^2; l2 = mean_b sum_d (x - x_hat)^2;
        l0 = mean_b sum_i [z_bi > theta_i], the mean over the batch, in float32;
        pre = x W_enc.T + b_enc (no b_dec); z = pre [pre > theta].
        Estimators: dz/dpre = [pre > theta]; dz/dtheta = -theta/bw [|pre - theta| < bw/2];
        d[z > theta]/dtheta = -1/bw [|z - theta| < bw/2] with z and not pre: one-sided, and where
        theta < bw/2 every inactive entry (z = 0) counts; l0 gives pre no gradient""",
    "dl_gated": """loss = mse + c sparsity + aux; x_c = x - b_dec; pi = x_c W_enc.T + b_gate;
        z = [pi > 0] relu(exp(r_mag) (x_c W_enc.T) + b_mag); mse = mean_b sum_d (x - x_hat)^2;
        sparsity = mean_b sum_i relu(pi_bi), no decoder norm;
        aux = mean_b sum_d (x - relu(pi) stop(W_dec) - stop(b_dec))^2, but b_dec is trained by
        sparsity and aux through x_c""",
    "dl_standard": """loss = mse + c sparsity; mse = mean_b sum_d (x - x_hat)^2;
        l2_loss (logged only) = mean_b |x - x_hat|. autoencoder (the trainer's default dict_class):
        z = relu((x - b_dec) W_enc.T + b_enc), sparsity = mean_b sum_i z_bi |W_dec_i|.
        new: z = relu(x W_enc.T + b_enc), and because AutoEncoderNew already returns z times the
        norm, sparsity = mean_b sum_i z_bi |W_dec_i|^2. Norms are differentiated""",
}
FORMULAS = {name: " ".join(text.split()) for name, text in FORMULAS.items()}
