#pragma once

#include "arguments.h"
#include "redknot/select.h"

// From the arguments of a call to the struct of its kernel, on whichever device `args` allows;
// values of tensors are not read.
namespace redknot::binding {

struct TokenImportanceCall {
  TokenImportanceParams params;
  Tensor importance;
};
TokenImportanceCall token_importance_call(const Arguments& args, const Tensor& attn_out);

struct SelectTokensCall {
  SelectTokensParams params;
  Tensor indices;
  Tensor count;
};
SelectTokensCall select_tokens_call(const Arguments& args,
                                    const Tensor& importance,
                                    const Tensor& cu_seqlens,
                                    double mass,
                                    int64_t recent_n,
                                    int64_t min_keep);

}  // namespace redknot::binding
